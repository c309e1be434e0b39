"""Each process of the tests, of which there may be several at a time, keeps to folders of its own."""

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

_folder = Path(tempfile.mkdtemp(prefix="pixelcnn-tests-"))
# Before any tool is imported: what is the person's is neither read nor written, no service of theirs is asked or told.
for _name in list(os.environ):
    _theirs = "PIXELCNN_(?!TEST_|KILLS)|MLFLOW_(TRACKING|REGISTRY)_URI|PREFECT_API_URL|OTEL_|PROMETHEUS_MULTIPROC_DIR"
    if re.match(_theirs, _name):
        del os.environ[_name]
# A command that is called in a test comes too late for its own setting of this: Prefect is imported by then.
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
os.environ |= {"PREFECT_HOME": str(_folder / "prefect"), "BENTOML_HOME": str(_folder / "bentoml")}


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order and trace the tests.

    Modules with a long test come first, then the larger ones: else one process works at the last of them long after
    the others have ended.
    Of a test's parameters the last is traced, not all: it takes Python twice the time. The first may compile a sampler.
    """
    marks = ("slow", "repeated", "timeout")
    long = {item.path for item in items if any(map(item.get_closest_marker, marks))}
    items.sort(key=lambda item: (item.path not in long, -item.path.stat().st_size))
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for same in cases.values():
        for item in same[:-1]:
            item.add_marker("no_cover")
