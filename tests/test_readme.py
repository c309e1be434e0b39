"""What the README says is so: its commands exist, and its table is that of the committed metrics."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAIRS = sorted(path.parent.name for path in (ROOT / "reports").glob("*/metrics.json"))


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z]+)", README))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_every_file_of_the_readme_exists() -> None:
    for name in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / name).exists(), name


def test_every_module_command_of_the_readme_exists() -> None:
    for module in set(re.findall(r"python -m ([a-z_.]+)", README)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_metrics_are_there() -> None:
    assert PAIRS


@pytest.mark.parametrize("pair", PAIRS)
def test_the_table_is_that_of_the_metrics(pair: str) -> None:
    scores = json.loads((ROOT / "reports" / pair / "metrics.json").read_text())
    (row,) = re.findall(rf"^\| `{pair}` \|(.*)\|$", README, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[0] == f"{scores['num_parameters']:,}"
    assert cells[1] == f"{scores['test/nll_nats']:.2f} ± {scores['test/nll_nats_stderr']:.2f}"
    assert cells[2] == f"{scores['test/bits_per_dim']:.4f}"
    assert f"{scores['test/nll_nats_independent']:.1f}" in README
    assert f"{scores['test/nll_nats_uniform']:.1f}" in README
