"""Hostile requests, by hand: each is refused with one sentence, and nothing else happens."""

import base64
import gzip
import io
import json
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from app.service import images, wire

HEADERS = {"Content-Type": "application/json"}
OBSERVED = [[0] * 4] * 5
NOT_NAMES = [
    "../grey",
    "grey\0",
    "grey/../grey",
    "GREY",
    "\uff47rey",
    "grey\u200b",
    "g\u0435y",
    "",
    " grey",
    "%67rey",
    "x" * 9999,
]


def error_of(response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    text = response.json()["error"]
    assert "Traceback" not in text
    assert "\n" not in text
    assert len(text) < 400
    return text


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int = 4, height: int = 5, depth: int = 8, colour: int = 0, more: bytes = b"", data: bytes = b""
) -> bytes:
    """Return a PNG by hand, grey and black where not told otherwise."""
    rows = data or b"".join(b"\0" + b"\0" * (width * depth // 8) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + end


def saved(picture: Image.Image, form: str = "PNG", **more) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **more)
    return buffer.getvalue()


def score(client, image):
    text = base64.b64encode(image).decode() if isinstance(image, bytes) else image
    return client.post("/likelihood", json={"dataset": "grey", "image": text})


GREY_PICTURE = Image.new("L", (4, 5))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (png(50_000, 50_000, data=b"\0"), "image must be 4 x 5 pixels, got many more."),  # 2.5 GB when read
        (png(9_000, 9_000, data=b"\0"), "image must be 4 x 5 pixels, got 9000 x 9000."),
        (png(2**31 - 1, 2**31 - 1, data=b"\0"), "image"),
        (png(0, 0, data=b"\0"), "image"),
        (
            png(more=chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 2_000_000, 9))),
            "image is no readable PNG",
        ),  # a bomb beside the pixels
        (png(depth=16), "image is a PNG of 16 bits per channel: save it with 8."),
        (saved(Image.fromarray(np.zeros((5, 4), np.uint16))), "image is a PNG of 16 bits per channel"),
        (
            saved(GREY_PICTURE, save_all=True, append_images=[Image.new("L", (4, 5), 255)]),
            "image is an animated PNG: take one picture of it.",
        ),
        (saved(Image.new("LA", (4, 5))), "image is transparent where it counts"),
        (saved(GREY_PICTURE)[:-20], "image is no readable PNG"),
        (saved(GREY_PICTURE)[:40], "image is no readable PNG"),
        (b"\x89PNG\r\n\x1a\n", "image is no readable PNG"),
        (b"", "image is no readable PNG"),
        (png(data=b"\0"), "image is no readable PNG"),  # pixels are missing
        (png(data=b"\7" * 25), "image is no readable PNG"),  # a filter that there is not
        (png(colour=6, depth=3), "image is no readable PNG"),
        (saved(GREY_PICTURE, "BMP"), "image is no readable PNG"),
        (saved(GREY_PICTURE, "GIF"), "image is no readable PNG"),
        (saved(GREY_PICTURE, "TIFF"), "image is no readable PNG"),
        (saved(GREY_PICTURE, "JPEG"), "image is no readable PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 5\n", "image is no readable PNG"),
        (gzip.compress(saved(GREY_PICTURE), mtime=0), "image is no readable PNG"),
        (base64.b64encode(saved(GREY_PICTURE)).decode() + "!!", "image must be a PNG in base64"),
        ("data:image/png;base64," + base64.b64encode(saved(GREY_PICTURE)).decode(), "image must be a PNG in base64"),
        ("iVBORw0K\n", "image must be a PNG in base64"),
        ("\u0130" * 8, "image must be a PNG in base64"),
        ("A", "image must be a PNG in base64"),
        ("", "image is no readable PNG"),
    ],
)
def test_a_picture_that_is_not_one_is_refused(client, image, expected):
    sentence = error_of(score(client, image))
    assert sentence.startswith(expected)
    assert " object at " not in sentence


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGB", "RGBA"])
def test_other_kinds_of_png_mean_what_they_show(client, mode):
    picture = Image.fromarray(np.array([[0, 255, 0, 255]] * 5, np.uint8)).convert(mode)
    expected = client.post("/likelihood", json={"dataset": "grey", "image": [[0, 1, 0, 1]] * 5}).json()
    assert score(client, saved(picture)).json() == expected


def test_a_png_may_be_transparent_where_it_is_missing(client):
    picture = base64.b64encode(saved(Image.new("LA", (4, 5)))).decode()
    request = {"dataset": "grey", "image": picture, "observed": OBSERVED}
    assert client.post("/complete", json=request).status_code == 200
    request["observed"] = [[0, 1, 0, 0], *OBSERVED[1:]]
    assert error_of(client.post("/complete", json=request)).startswith("image is transparent where it counts")


def test_a_damaged_png_is_refused_or_read_but_never_an_error_of_ours(client):
    draw = np.random.default_rng(0)
    whole = saved(Image.fromarray(draw.integers(256, size=(5, 4), dtype=np.uint8)).convert("P"))
    for _ in range(150):
        damaged = bytearray(whole)
        for at in draw.integers(8, len(whole), size=draw.integers(1, 4)):
            damaged[at] ^= 1 << int(draw.integers(8))
        response = score(client, bytes(damaged))
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            error_of(response)


@pytest.mark.parametrize("path", ["/complete", "/complete_stream", "/likelihood"])
def test_a_picture_that_takes_long_to_read_holds_up_nobody_else(client, monkeypatch, path):
    """A PNG of 60 kB can hold sixty comments of a megabyte each: a quarter of a second."""
    begun, go = threading.Event(), threading.Event()

    def read_slowly(*arguments, **options):
        begun.set()
        assert go.wait(30)  # a loaded machine is no failure
        raise ValueError("image was slow")

    monkeypatch.setattr(images, "from_png", read_slowly)
    request = {"dataset": "grey", "image": base64.b64encode(png()).decode()}
    request |= {} if path == "/likelihood" else {"observed": OBSERVED}
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.post, path, json=request)
        assert begun.wait(30)
        assert client.post("/generate", json={"dataset": "grey"}).status_code == 200
        go.set()
        assert error_of(slow.result()) == "image was slow"


@pytest.mark.parametrize("path", ["/generate", "/complete", "/likelihood"])
@pytest.mark.parametrize("name", NOT_NAMES)
def test_only_the_names_that_are_served_are_names(client, path, name):
    request = {"dataset": name}
    if path != "/generate":
        request["image"] = [[0] * 4] * 5
    if path == "/complete":
        request["observed"] = OBSERVED
    assert error_of(client.post(path, json=request), 404).startswith("there is no champion for dataset ")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"dataset": "grey", "dataset": "colour"}', "the field 'dataset' stands twice in the request: send it once."),
        ('{"dataset": "grey", "seed": 1, "\\u0073eed": 2}', "the field 'seed' stands twice in the request"),
        ('{"dataset": {"a": 1, "a": 1}}', "the field 'a' stands twice in the request"),
        ('{"dataset": "grey", "seed": 18446744073709551616}', "seed must be less than or equal to 9223372036854775807"),
        ('{"dataset": "grey", "seed": 1e400}', "seed must be a valid integer, got inf."),
        ('{"dataset": "grey", "seed": -0.0}', "seed must be a valid integer, got -0.0."),
        ('{"dataset": "grey", "temperature": 1e999}', "temperature must be a finite number, got inf."),
        ('{"dataset": "grey", "temperature": -1e-320}', "temperature must be greater than or equal to 0"),
        ('{"dataset": "grey", "num_samples": 999999999999999999999}', "num_samples must be less than or equal to 16"),
        ('{"dataset": "grey", "__class__": 1}', "unknown field '__class__'. Known: dataset, "),
        ('{"dataset": "grey", "\\u0000": 1}', "unknown field '\\x00'. Known: dataset, "),
        ('{"datset": "grey"}', "unknown field 'datset'. Known: dataset, "),
        ('{"": 1}', "unknown field ''. Known: dataset, "),
        ('{"dataset": "grey", "\\ud800": 1}', "unknown field '\\ud800'. Known: dataset, "),
        ('{"dataset": "grey"} {"dataset": "grey"}', "the request is no readable JSON"),
        ('\ufeff{"dataset": "grey"}', "the request is no readable JSON"),
        ("{'dataset': 'grey'}", "the request is no readable JSON"),
        ("null", "the request must be a JSON object"),
        pytest.param(
            f'{{"dataset": "colour", "label": {"9" * 4000}}}', "label must be absent: this model knows no", id="long"
        ),
    ],
)
def test_json_that_two_readers_would_read_differently(client, body, expected):
    assert error_of(client.post("/generate", content=body.encode(), headers=HEADERS)).startswith(expected)


def test_of_many_unknown_fields_only_one_is_described(client, monkeypatch):
    """Each that is described costs the event loop some microseconds, and a body has room for a hundred thousand."""
    described: list[dict] = []
    monkeypatch.setattr(wire.ApiRequest, "model_validate", described.append)
    body = json.dumps({f"f{i}": 1 for i in range(50_000)})
    response = client.post("/generate", content=body.encode(), headers=HEADERS)
    assert error_of(response).startswith("unknown field 'f0'. Known: dataset, ")
    assert described == []


@pytest.mark.parametrize("depth", [10, 100, 300, 500, 700, 800, 850, 900, 950, 990, 1000, 2000, 100_000])
@pytest.mark.parametrize("field", ["image", "observed", "seed", "unknown"])
@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}")])
def test_nesting_of_any_depth(client, depth, field, opens, closes):
    deep = opens * depth + "1" + closes * depth
    fields = {"dataset": '"grey"', "image": json.dumps([[0] * 4] * 5), "observed": json.dumps(OBSERVED), field: deep}
    body = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
    error_of(client.post("/complete", content=body.encode(), headers=HEADERS))


def test_a_value_of_many_layers_can_be_told_of():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert wire.quoted(deep) == "something of many layers"


def test_a_compressed_body_is_not_unpacked(client):
    bomb = gzip.compress(b" " * 100_000_000, mtime=0)
    response = client.post("/generate", content=bomb, headers={**HEADERS, "Content-Encoding": "gzip"})
    assert error_of(response).startswith("the request is no readable JSON")


def test_a_length_that_lies_is_no_way_round_the_limit(client):
    for length in ("99999999999999999999", "1000001"):
        response = client.post("/generate", content=b"{}", headers={**HEADERS, "Content-Length": length})
        assert error_of(response, 413).startswith("the request must have at most 1000000 bytes")


@pytest.mark.parametrize(
    "path", ["/../complete", "/complete%00", "/complete/../models", "//complete", "/%2e%2e/etc/passwd"]
)
def test_no_path_leads_anywhere_else(client, path):
    response = client.post(path, json={"dataset": "grey"}, follow_redirects=False)
    assert response.status_code in (400, 404, 405), response.status_code
    error_of(response, response.status_code)


def test_known_values_only_at_pixels_that_are_known(client):
    """NaN and Infinity are no JSON, but Python reads them."""
    for value in ("NaN", "Infinity", "-Infinity", "1e400"):
        rows = f"[[{value}, 0, 0, 0], {', '.join(['[0, 0, 0, 0]'] * 4)}]"
        for field in ("image", "observed"):
            fields = {"image": json.dumps([[0] * 4] * 5), "observed": json.dumps(OBSERVED), field: rows}
            body = '{"dataset": "grey", ' + ", ".join(f'"{name}": {rows}' for name, rows in fields.items()) + "}"
            text = error_of(client.post("/complete", content=body.encode(), headers=HEADERS))
            assert text.startswith(f"{field}[0][0] must be a whole number, got ")
