"""Imports point one way: app -> HTTP -> service -> pixelcnn <- pipelines."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pixelcnn

ROOT = Path(__file__).parents[1]
CORE = {"torch", "numpy", "safetensors", "PIL", "numba", "pixelcnn"}
ONLY_IN = {
    "mlflow": {"pipelines/tracking.py", "pipelines/registry.py", "pipelines/logged_model.py"},
    "bentoml": {"pipelines/store.py", "app/champions.py", "app/service.py", "app/wire.py"},
    "streamlit": {"app/canvas.py", "app/pages.py"},
}
SERVICE_SIDE = (
    "app/batching.py",
    "app/champions.py",
    "app/gate.py",
    "app/jobs.py",
    "app/metrics.py",
    "app/openapi.py",
    "app/service.py",
    "app/wire.py",
)
CANVAS_SIDE = (
    "app/bench_service.py",
    "app/canvas.py",
    "app/client.py",
    "app/demo.py",
    "app/drawing.py",
    "app/pages.py",
)


def imports_of(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def third_party(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).glob("**/*.py"))
    assert found, package
    return found


@pytest.mark.parametrize("path", sources("pixelcnn"), ids=lambda p: p.name)
def test_the_core_needs_only_its_own_packages(path: Path) -> None:
    assert third_party(path) <= CORE


@pytest.mark.parametrize("path", sources("pipelines"), ids=lambda p: p.name)
def test_pipelines_do_not_know_the_app(path: Path) -> None:
    assert "app" not in third_party(path)


@pytest.mark.parametrize("name", SERVICE_SIDE)
def test_the_service_knows_the_core_alone(name: str) -> None:
    assert not third_party(ROOT / name) & {"pipelines", "mlflow", "prefect", "streamlit", "httpx"}
    parts = {f"app.{Path(other).stem}" for other in SERVICE_SIDE if other != "app/service.py"}
    assert {module for module in imports_of(ROOT / name) if module.split(".")[0] == "app"} <= parts


@pytest.mark.parametrize("name", CANVAS_SIDE)
def test_the_canvas_knows_the_wire_alone(name: str) -> None:
    forbidden = {"torch", "pixelcnn", "pipelines", "bentoml", "mlflow", "prefect"}
    assert not third_party(ROOT / name) & forbidden
    assert not {f"app.{Path(other).stem}" for other in SERVICE_SIDE} & imports_of(ROOT / name)


@pytest.mark.parametrize("tool", ONLY_IN)
def test_each_tool_has_its_place(tool: str) -> None:
    paths = [path for package in ("pixelcnn", "pipelines", "app") for path in sources(package)]
    users = {str(path.relative_to(ROOT)) for path in paths if tool in third_party(path)}
    assert users
    assert users <= ONLY_IN[tool]


def test_importing_the_core_loads_no_pipeline_tool() -> None:
    code = (
        "import sys, pixelcnn, pixelcnn.__main__; "
        "print(sorted({'prefect', 'mlflow', 'dvc', 'bentoml', 'streamlit', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    for name in pixelcnn.__all__:
        assert getattr(pixelcnn, name) is not None
