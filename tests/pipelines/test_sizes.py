"""Short trainings compared at equal time."""

from collections.abc import Callable
from pathlib import Path

import pytest

import pixelcnn
from benchmarks.command import command
from benchmarks.sizes import compare
from pixelcnn.data import Dataset
from pixelcnn.training import Network, StepReport, TrainConfig
from tests.pipelines.projects import PAIR, tiny_params, write_params


def test_a_row_for_each_variant(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = tiny_params()  # a pair with a completer and a label network: what is compared leaves them out
    params["pairs"][PAIR]["network"] |= {"context_features": 2, "completer_features": 2, "label_features": 2}
    params["pairs"][PAIR]["completer"] = params["pairs"][PAIR]["labels"] = params["pairs"][PAIR]["train"]
    write_params(Path(), params)
    text = f"minutes: 0.01\nnum_images: 8\npairs:\n  {PAIR}: [{{}}, {{network: {{num_features: 5}}}}]\n"
    Path("variants.yaml").write_text(text)
    assert command(compare, ["--variants", "variants.yaml", "--out", "table.md"]) == 0
    rows = [line for line in Path("table.md").read_text().splitlines() if line.endswith(" nats |")]
    assert [row.split(" | ")[0] for row in rows] == ["| as in params.yaml", "| num_features 5"]
    printed = capsys.readouterr().out
    parameters = [int(row.split(" | ")[1].replace(",", "")) for row in rows]
    assert parameters[0] < parameters[1]
    for row in rows:
        assert 100 < float(row.split(" | ")[-1].removesuffix(" nats |")) < 1000
        assert f"{PAIR} {row}" in printed


def test_a_context_network_is_compared_by_whole_images_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[StepReport] = []

    def fit(model: Network, data: Dataset, config: TrainConfig, on_step: Callable[[StepReport], None]) -> float:
        return pixelcnn.fit(model, data, config, lambda report: reports.append(report) or on_step(report))

    monkeypatch.setattr("benchmarks.sizes.fit", fit)
    row = "{network: {context_features: 2}, train: {context_share: 0.75}}"
    Path("variants.yaml").write_text(f"minutes: 0.01\nnum_images: 8\npairs: {{{PAIR}: [{row}]}}\n")
    assert command(compare, ["--variants", "variants.yaml", "--out", "table.md"]) == 0
    whole = reports[-1].validation_nll_nats
    assert whole is not None
    assert Path("table.md").read_text().endswith(f" | {whole:.2f} nats |\n"), "not a mean with missing parts"


def test_what_was_measured_of_other_pairs_stays(project: Path) -> None:
    words = [PAIR, "--variants", "variants.yaml", "--out", "table.md"]

    def measured(minutes: float) -> str:
        variants = f"minutes: {minutes}\nnum_images: 8\npairs: {{a: [{{}}], {PAIR}: [{{}}], b: [{{}}]}}\n"
        Path("variants.yaml").write_text(variants)
        assert command(compare, words) == 0
        return Path("table.md").read_text()

    head, _, own = measured(0.01).partition("## ")
    assert "`ema_decay` is 0.99 at most, and `head_features`, context, completer and label networks are left" in head
    of_a, of_b = "## a\n\n| 1 |\n\nA note.\n", "## b\n\n| 2 |\n"
    Path("table.md").write_text(f"{head}{of_a}\n## {own.replace('nats', 'old')}\n{of_b}")
    again = measured(0.01)
    assert again.startswith(f"{head}{of_a}\n## {PAIR}\n\n| changed |")
    assert again.endswith(f" nats |\n\n{of_b}")
    assert " old |" not in again
    assert of_a not in measured(0.02)  # of other settings


def test_its_mistakes_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(compare, ["--variants", "nowhere.yaml"]) == 1
    assert "sizes: nowhere.yaml must hold minutes, num_images and pairs" in capsys.readouterr().err
    Path("variants.yaml").write_text(f"minutes: 0.01\nnum_images: 8\npairs:\n  {PAIR}: [{{size: 3}}]\n")
    assert command(compare, ["--variants", "variants.yaml", "--out", "table.md"]) == 1
    assert "unknown key 'size'. Known: network, train." in capsys.readouterr().err
    assert command(compare, ["typo", "--variants", "variants.yaml", "--out", "table.md"]) == 1
    assert f"sizes: variants.yaml has no pair 'typo', only {PAIR}." in capsys.readouterr().err
    assert not Path("table.md").exists()
