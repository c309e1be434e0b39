"""Short trainings compared at equal time."""

from pathlib import Path

import pytest

from benchmarks.sizes import main
from tests.pipelines.projects import PAIR, tiny_params, write_params


def test_a_row_for_each_variant(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = tiny_params()  # a pair with a completer and a label network: what is compared leaves them out
    params["pairs"][PAIR]["network"] |= {"context_features": 2, "completer_features": 2, "label_features": 2}
    params["pairs"][PAIR]["completer"] = params["pairs"][PAIR]["labels"] = params["pairs"][PAIR]["train"]
    write_params(Path(), params)
    text = f"minutes: 0.01\nnum_images: 8\npairs:\n  {PAIR}: [{{}}, {{network: {{num_features: 5}}}}]\n"
    Path("variants.yaml").write_text(text)
    assert main(["--variants", "variants.yaml", "--out", "table.md"]) == 0
    rows = [line for line in Path("table.md").read_text().splitlines() if line.endswith(" nats |")]
    assert [row.split(" | ")[0] for row in rows] == ["| as in params.yaml", "| num_features 5"]
    printed = capsys.readouterr().out
    parameters = [int(row.split(" | ")[1].replace(",", "")) for row in rows]
    assert parameters[0] < parameters[1]
    for row in rows:
        assert 100 < float(row.split(" | ")[-1].removesuffix(" nats |")) < 1000
        assert f"{PAIR} {row}" in printed


def test_what_was_measured_of_other_pairs_stays(project: Path) -> None:
    Path("variants.yaml").write_text(f"minutes: 0.01\nnum_images: 8\npairs: {{a: [{{}}], {PAIR}: [{{}}], b: [{{}}]}}\n")
    of_a, of_b = "## a\n\n| 1 |\n\nA note.\n", "## b\n\n| 2 |\n"
    Path("table.md").write_text(f"# Old\n\n{of_a}\n## {PAIR}\n\n| 3 |\n\n{of_b}")
    assert main([PAIR, "--variants", "variants.yaml", "--out", "table.md"]) == 0
    head, rest = Path("table.md").read_text().split(of_a)
    assert (
        "`ema_decay` is 0.99 at most, and `head_features`, context, completer and label networks are left out" in head
    )
    assert rest.startswith(f"\n## {PAIR}\n\n| changed |")
    assert rest.endswith(f" nats |\n\n{of_b}")
    assert "| 3 |" not in rest


def test_its_mistakes_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--variants", "nowhere.yaml"]) == 1
    assert "sizes: nowhere.yaml must hold minutes, num_images and pairs" in capsys.readouterr().err
    Path("variants.yaml").write_text(f"minutes: 0.01\nnum_images: 8\npairs:\n  {PAIR}: [{{size: 3}}]\n")
    assert main(["--variants", "variants.yaml", "--out", "table.md"]) == 1
    assert "unknown key 'size'. Known: network, train." in capsys.readouterr().err
    assert not Path("table.md").exists()
