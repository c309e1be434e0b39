"""What README and docs say is so: commands, files and tests exist; the table is that of the committed metrics."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from pipelines.datasets.entry import OFFICIAL
from pipelines.reports.card import score_text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OTHERS = {"pip", "pytest", "tarfile", "venv"}  # modules of Python and of packages
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]


def committed(*words: str) -> str:
    """Return what git says of the committed files: a run of the pipeline may have changed those in the folder."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


METRICS = committed("ls-tree", "-r", "--name-only", "HEAD", "reports").split()


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_exists(page: Path) -> None:
    for name in re.findall(r"\]\(([^):#]+)\)", page.read_text()):
        assert (page.parent / name).exists(), name


def test_every_test_of_the_docs_is_in_the_file_that_it_is_named_with() -> None:
    """`test_file.py::test_name`; a later `::test_name` of the same cell of a table is in the same file."""
    named: list[tuple[str, str]] = []
    for cell in (cell for page in PAGES for line in page.read_text().splitlines() for cell in line.split(" | ")):
        file = ""
        for new_file, name in re.findall(r"(\w+\.py)?::(test_\w+)", cell):
            file = new_file or file
            named.append((file, name))
    assert len(named) > 50
    for file, name in named:
        paths = list((ROOT / "tests").rglob(file))
        assert any(f"def {name}(" in path.read_text() for path in paths), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_command_exists(page: Path) -> None:
    for module in set(re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)", page.read_text())) - OTHERS:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_metrics_are_there() -> None:
    assert len(METRICS) == 2


@pytest.mark.parametrize("path", METRICS)
def test_the_table_is_that_of_the_metrics(path: str) -> None:
    scores = json.loads(committed("show", f"HEAD:{path}"))
    (row,) = re.findall(rf"^\| `{Path(path).parent.name}` \|(.*)\|$", README, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[0] == f"{scores['num_parameters']:,}"
    assert cells[1] == f"{scores['test/nll_nats']:.2f} ± {scores['test/nll_nats_stderr']:.2f}"
    assert cells[2] == f"{scores['test/bits_per_dim']:.4f}"
    assert f"{scores['test/nll_nats_independent']:.1f}" in README
    assert f"{scores['test/nll_nats_uniform']:.1f}" in README


def test_the_released_table_is_that_of_the_scores() -> None:
    folders = sorted(path.parent for path in (ROOT / "weights").glob("*/config.json"))
    rows = dict(re.findall(r"^\| `([a-z0-9_-]+)` \|(.*± [0-9.]+ (?:nats|bits/dim) .*)\|$", README, re.MULTILINE))
    assert sorted(rows) == [folder.name for folder in folders]
    for folder in folders:
        config, scores = (json.loads((folder / name).read_text()) for name in ("config.json", "scores.json"))
        (num_threads,) = re.findall(r"^(\d+) CPU threads?\b", scores["hardware"])
        expected = [
            score_text(scores, "test", config),
            f"{scores['num_parameters']:,}",
            f"{scores['train_minutes']:.0f} min" + (f", {num_threads} threads" if num_threads != "1" else ""),
            scores["protocol"],
        ]
        assert [cell.strip() for cell in rows[folder.name].split("|")] == expected
        assert scores["test/num_images"] == (10_000 if scores["dataset"] in OFFICIAL else 1310)
