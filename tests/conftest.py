"""Each process of the tests, of which there may be several at a time, keeps to folders of its own."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

_folder = Path(tempfile.mkdtemp(prefix="pixelcnn-tests-"))
# Before any tool is imported: what these hold of the person's is neither read nor written.
os.environ |= {"PREFECT_HOME": str(_folder / "prefect"), "BENTOML_HOME": str(_folder / "bentoml")}


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Trace the first, the middle and the last parameters of a test, not all: it costs Python a quarter more time."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for same in cases.values():
        for item in {*same} - {same[0], same[len(same) // 2], same[-1]}:
            item.add_marker("no_cover")
