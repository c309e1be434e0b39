"""The page takes images of other sides, levels and labels: drawn, completed, generated, scored, uploaded."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from streamlit.testing.v1 import AppTest

from app.canvas.drawing import TOUCHED, Drawing, drawing_text
from app.canvas.endings import shape_of
from app.client import ServedModel
from tests.app.stub_service import StubService, served
from tests.app.test_canvas import go_to
from tests.app.test_photo import photo, saved

PAGE = Path(__file__).parents[2] / "app" / "canvas" / "main.py"
KINDS = {
    "scans": served((1, 48, 32), 2, [], "binary"),
    "sprites": served((1, 16, 16), 4, [f"kind {i}" for i in range(62)], "4 levels"),
    "photographs": served((3, 64, 64), 256, ["cat"], "8-bit"),
}


def open_page(service: StubService, dataset: str, monkeypatch: pytest.MonkeyPatch) -> tuple[AppTest, np.ndarray]:
    """Open the page with something on its grid; return it, and that as levels."""
    service.models = {dataset: KINDS[dataset]}
    monkeypatch.setenv("PIXELCNN_SERVICE_URL", service.url)
    model = ServedModel.model_validate(KINDS[dataset])
    shape, page = shape_of(model), AppTest.from_file(str(PAGE), default_timeout=20)
    levels = np.zeros(shape, dtype=int)
    levels[2:9, 3:6] = model.levels - 1
    mark = np.zeros(shape[:2], dtype=int)
    mark[2:9, 3:6] = TOUCHED
    drawing = Drawing(levels * 255 // (model.levels - 1), mark)
    page.session_state[f"grid-{'x'.join(map(str, shape))}"] = {"ink": drawing_text(drawing)}
    page.session_state["live"] = False
    return page.run(), levels


def shown(page: AppTest) -> list[np.ndarray]:
    """All pictures on the page, as pixels."""
    body = " ".join(element.proto.body for element in page.get("html"))
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", body)
    return [np.array(PIL.Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


@pytest.mark.parametrize("dataset", KINDS)
def test_images_of_any_kind(service: StubService, monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    page, levels = open_page(service, dataset, monkeypatch)
    labels = KINDS[dataset]["labels"]
    if labels:
        page.selectbox(key="label").set_value(len(labels) - 1).run()
    page.button(key="main").click().run()
    assert not page.exception
    path, body = service.requests[-1]
    assert (path, body["label"]) == ("/complete_stream", len(labels) - 1)
    assert body["image"] == levels.tolist()
    pictures = shown(page)
    assert len(pictures) >= 9
    assert {picture.shape for picture in pictures} == {(*levels.shape[:2], 4)}
    for name, number in (("Generate", 16), ("Surprise", 2)):
        go_to(page, name)
        assert not page.exception
        assert [picture.shape[:2] for picture in shown(page)] == [levels.shape[:2]] * number
    assert service.requests[-1][1]["image"] == levels.tolist()


def test_a_photo_is_laid_as_the_model_lays_its_ink(service: StubService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "generated", lambda body: {**made, "images": boxes(body["num_samples"])})
    made = {"log_probs": [-1.0], "seed": 0, "model": KINDS["scans"]["model"]}

    def boxes(num: int) -> list[list[list[int]]]:
        images = np.zeros((num, 48, 32), dtype=int)
        images[:, 12:36, 8:24] = 1  # half of the grid
        return images.tolist()

    page, _ = open_page(service, "scans", monkeypatch)
    page.button_group(key="source").set_value("file").run()
    page.get("file_uploader")[0].set_value(("four.png", saved(photo(150, 60, slope=0.6)), "image/png")).run()
    assert not page.exception
    preview = shown(page)[-1][..., 0] < 128
    rows, columns = np.argwhere(preview).T
    assert columns.max() - columns.min() + 1 == pytest.approx(16, abs=1)
    assert (rows.min() + rows.max()) / 2 == pytest.approx(23.5, abs=1)
    assert 40 < preview.sum() < 200
    # Without ink there is nothing to put on the grid.
    page.get("file_uploader")[0].set_value(("none.png", saved(photo(200, 200)), "image/png")).run()
    assert [warning.value for warning in page.warning] == [
        "No ink was found in this picture. Take it nearer, on plain paper."
    ]
    assert [path for path, _ in service.requests] == ["/generate"]  # a model's images are measured once
