"""The service behaves as its OpenAPI document says, in as many cases as are asked for."""

import os
import sys

import httpx
import pytest

from app.service.api import PixelCNNService
from pipelines.registry import store
from tests.local import run
from tests.service.champions import COLOUR, GREY, put
from tests.service.served import serving

# The size that the documents state: PIXELCNN_TEST_CASES=1000, per endpoint.
NUM_CASES = int(os.environ.get("PIXELCNN_TEST_CASES", "3"))
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
]
OPTIONS = f"""
--checks {",".join(CHECKS)} --mode all --phases coverage,fuzzing --max-examples {NUM_CASES} --seed 1
--generation-allow-x00 true --max-response-time 30 --include-method POST
--suppress-health-check all --warnings off --no-color
""".split()
STATUSES = (400, 401, 404, 408, 413, 415, 429, 500, 504)


def test_the_document_names_what_is_served(client):
    document, served = (client.get(path).json() for path in ("/docs.json", "/models"))
    assert document["openapi"] == "3.1.0"
    for path in ("/complete", "/complete_stream", "/generate", "/likelihood"):
        operation = document["paths"][path]["post"]
        assert set(operation["responses"]) == {"200", *map(str, STATUSES)}
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        requests = document["components"]["schemas"][reference.rpartition("/")[2]]["oneOf"]
        assert {"grey", "colour"} <= {request["properties"]["dataset"]["const"] for request in requests}
        assert not any(request["additionalProperties"] for request in requests)
        counts = [request["properties"].get("num_samples", {"maximum": 16}) for request in requests]
        assert all(count["maximum"] == 16 for count in counts)
        assert operation["requestBody"]["required"]
        assert operation["responses"]["429"]["headers"]["Retry-After"]["required"]
        for fields in (request["properties"] for request in requests):
            label, nothing = fields["label"]["anyOf"]
            most = len(served[fields["dataset"]["const"]]["labels"]) - 1
            assert (label["minimum"], label["maximum"], nothing) == (-1, most, {"type": "null"})
            if "image" in fields:
                assert fields["image"]["oneOf"][1]["contentMediaType"] == "image/png"
    assert "get" in document["paths"]["/models"]
    readiness = document["paths"]["/readyz"]["get"]["responses"]
    assert set(readiness) == {"200", "503"}
    assert readiness["503"]["headers"]["Retry-After"]["required"]
    stream = document["paths"]["/complete_stream"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert stream["schema"]["properties"]["event"]["enum"] == ["rows", "result", "error"]
    assert "InvalidArgument" not in str(document)


def test_the_document_is_not_made_anew_for_each_who_asks(client, monkeypatch):
    """It takes as long as a drawing, and no gate bounds who reads."""
    before = client.get("/docs.json").json()
    monkeypatch.setattr(type(PixelCNNService), "openapi_spec", None)
    assert client.get("/docs.json").json() == before


@pytest.mark.slow
@pytest.mark.repeated
@pytest.mark.timeout(300 + 10 * NUM_CASES)
def test_generated_requests_are_answered_as_the_document_says(tmp_path, monkeypatch):
    """Positive and negative ones, NUL bytes among them, and every boundary that the document states."""
    home = tmp_path / "bentoml"
    home.mkdir()
    monkeypatch.setenv("BENTOML_HOME", str(home))
    for dataset, config in (("grey", GREY), ("colour", COLOUR)):
        store.serve(put(tmp_path, dataset, config, "1", seed=0))
    with serving(home, tmp_path / "log") as served:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/docs.json", "--url", served.url]
        done = run([*command, *OPTIONS], 200 + 10 * NUM_CASES, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        print("\n".join(done.stdout.splitlines()[-25:]))
        assert httpx.get(f"{served.url}/models").status_code == 200
        assert "Traceback" not in served.log.read_text()
