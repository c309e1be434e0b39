"""Imports point one way: app -> HTTP -> service -> pixelcnn <- pipelines; tests, tools and benchmarks stand outside."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pixelcnn", "pipelines", "app")
OUTSIDE = ("benchmarks", "tools", "tests")
MAX_MODULES = 10  # in a folder

# Folders of a package, the lowest first: one imports those before it.
ORDER = (
    ("pixelcnn.models", "pixelcnn.sampling", "pixelcnn.training", "pixelcnn.packing"),
    (
        *("pipelines.datasets", "pipelines.registry", "pipelines.reports"),
        *("pipelines.stages", "pipelines.promotion", "pipelines.flows"),
    ),
)
# Programs: nothing but a program imports one.
PROGRAMS = {
    "pixelcnn.__main__",
    "pipelines.steps",
    "pipelines.operate",
    "pipelines.prefect_server",
    "app.demo",
    "app.canvas.main",
}

# Each tool, and the folders or modules of the packages that may import it.
PLACES = {
    "bentoml": ("pipelines.registry.store", "app.service"),
    "constriction": ("pixelcnn.packing",),
    "fastapi": ("app.service",),
    "httpx": ("pipelines.flows", "app.client"),
    "matplotlib": ("pipelines.datasets.letters", "pipelines.reports"),
    "mlflow": ("pipelines.registry",),
    "mlxtend": ("pipelines.datasets",),
    "numba": ("pixelcnn.sampling",),
    "PIL": ("pixelcnn.images", "pipelines.datasets", "app.canvas"),
    "prefect": ("pipelines.flows", "pipelines.operate", "pipelines.prefect_server"),
    "prometheus_client": ("app.service",),
    "ruamel": ("pipelines.datasets.own", "pipelines.files"),
    "segno": ("app.canvas",),
    "starlette": ("app.canvas", "app.service", "pipelines.prefect_server"),
    "streamlit": ("app.canvas",),
    "torchvision": ("pipelines.datasets",),
    "typer": ("pixelcnn.__main__", "pipelines"),
}


@cache
def modules() -> dict[str, Path]:
    """Return every module of ours, by its name; a folder's is that of its `__init__.py`."""
    paths = [path for folder in (*PACKAGES, *OUTSIDE) for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules that a module imports, wherever in its file, but not those for the type checker alone."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module
            for alias in node.names:  # `from folder import module` or `from module import name`
                full = f"{node.module}.{alias.name}"
                names.add(full if full in modules() else node.module)
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
                visit(child)

    visit(ast.parse(modules()[module].read_text()))
    return frozenset(names)


def within(name: str, *folders: str) -> bool:
    return any(name == folder or name.startswith(f"{folder}.") for folder in folders)


def graph(*folders: str) -> dict[str, set[str]]:
    """Return the modules of some folders, each with those of ours that it imports."""
    return {m: {name for name in imports(m) if name in modules()} for m in modules() if within(m, *folders)}


def breaking(rule: str, *folders: str) -> set[str]:
    """Return the imports, as `a -> b`, from modules of a folder into others."""
    return {f"{m} -> {name}" for m in modules() if within(m, rule) for name in imports(m) if within(name, *folders)}


def third_party(module: str) -> set[str]:
    roots = {name.split(".")[0] for name in imports(module)}
    return roots - sys.stdlib_module_names - {*PACKAGES, *OUTSIDE}


def test_the_modules_are_found() -> None:
    assert {*PACKAGES, "pixelcnn.models", "pixelcnn.likelihood", "benchmarks.plot", "tests.core.tiny"} <= set(modules())
    assert {*PROGRAMS, "app.client", "app.canvas", "app.service", "benchmarks.service"} <= set(modules())
    assert within("pixelcnn.models", *imports("pixelcnn.models.gated_pixelcnn")) is False
    assert "pixelcnn.models.masks" in imports("pixelcnn.models.gated_pixelcnn")


def test_packages_import_one_way() -> None:
    assert breaking("pixelcnn", "pipelines", "app", *OUTSIDE) == set()
    assert breaking("pipelines", "app", *OUTSIDE) == set()
    assert breaking("app", "pipelines", *OUTSIDE) == set()
    assert breaking("app.service", "app.canvas", "app.client", "app.demo") == set()
    # The canvas knows the wire alone.
    for client in ("app.canvas", "app.client", "app.demo", "benchmarks.service"):
        assert breaking(client, "app.service", "pixelcnn", "pipelines", "torch", "bentoml") == set()


def test_no_module_imports_itself_by_a_circle() -> None:
    graphlib.TopologicalSorter(graph(*PACKAGES, *OUTSIDE)).prepare()  # a CycleError names the circle


@pytest.mark.parametrize("order", ORDER, ids=lambda order: order[0].partition(".")[0])
def test_nothing_imports_upwards(order: tuple[str, ...]) -> None:
    found = set().union(*(breaking(lower, *order[i + 1 :]) for i, lower in enumerate(order)))
    assert found == set()


def test_programs_are_imported_by_programs_alone() -> None:
    found = {f"{m} -> {name}" for m in graph(*PACKAGES) if m not in PROGRAMS for name in imports(m) & PROGRAMS}
    assert found == set()


def test_folders_are_small() -> None:
    sizes: dict[Path, int] = {}
    for module in graph(*PACKAGES):
        path = modules()[module]
        sizes[path.parent] = sizes.get(path.parent, 0) + (path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): size for folder, size in sizes.items() if size > MAX_MODULES} == {}


def test_the_core_needs_only_its_own_packages() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    core = {re.split("[^a-z-]", one)[0].replace("pillow", "PIL") for one in listed}
    for module in graph("pixelcnn"):
        assert third_party(module) <= core, module


@pytest.mark.parametrize("tool", PLACES)
def test_each_tool_has_its_place(tool: str) -> None:
    users = {module for module in graph(*PACKAGES) if tool in third_party(module)}
    assert {user for user in users if not within(user, *PLACES[tool])} == set()
    assert [place for place in PLACES[tool] if not any(within(user, place) for user in users)] == []


def test_the_service_knows_no_pipeline_tool() -> None:
    assert breaking("app.service", "mlflow", "prefect", "dvc", "streamlit", "httpx") == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_what_tools_call_internal_is_imported_in_one_module(package: str) -> None:
    """Where a tool has no public way, one module holds what may break with its next version."""
    users = {
        module
        for module in graph(package)
        for name in imports(module)
        if name.split(".")[0] not in PACKAGES and any(part.startswith("_") for part in name.split(".")[1:])
    }
    assert len(users) <= 1


def test_packages_hold_nothing_for_tests() -> None:
    for module in graph(*PACKAGES):
        assert not third_party(module) & {"pytest", "hypothesis", "schemathesis", "playwright"}, module
        assert not any(within(name, "unittest") for name in imports(module)), module


def test_the_core_loads_no_pipeline_tool_and_no_compiler() -> None:
    """Torch's compiler, of which loading a checkpoint has no need, takes as long to import as the rest of the core."""
    others = {"prefect", "mlflow", "dvc", "bentoml", "streamlit", "torchvision", "matplotlib", "pandas"}
    others |= {"torch._dynamo", "sympy"}
    code = "import sys, pixelcnn, pixelcnn.__main__; pixelcnn.load_checkpoint('attentive_pixelcnn-mnist'); "
    code += f"print(sorted({others} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    import pixelcnn

    for name in pixelcnn.__all__:
        assert getattr(pixelcnn, name) is not None
