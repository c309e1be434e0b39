"""The comparison page: one file with everything in it, and every score beside its protocol."""

import base64
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pipelines import steps
from pipelines.reports.comparison import PAGE, read_reports, write_comparison
from tests.pipelines.projects import tiny_params, write_params

ROW = "step,epoch,train_nll_nats,train_subset_nll_nats,validation_nll_nats,learning_rate"


def write_report(folder: Path, pair: str, nats: float, colour: int) -> Path:
    report = folder / pair
    report.mkdir(parents=True)
    scores = {"num_parameters": 1234, "train_minutes": 2.5}
    for split in ("test", "validation"):
        scores |= {f"{split}/nll_nats": nats, f"{split}/nll_nats_stderr": 0.5, f"{split}/bits_per_dim": nats / 1000}
    (report / "metrics.json").write_text(json.dumps(scores))
    (report / "curve.csv").write_text(f"{ROW}\n10,1.0,90,91,92,0.1\n20,2.0,80,81,82,0.1\n")
    for name in ("curve.png", "samples.png"):
        Image.new("L", (3, 3), colour).save(report / name)
    return report


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, tiny_params())
    return tmp_path


def test_the_page_has_everything_in_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worse = write_report(Path("reports"), "pixelcnn-mnist", 87.5, 10)
    better = write_report(Path("reports"), "gated_pixelcnn-mnist", 81.25, 20)
    judged = {**json.loads((better / "metrics.json").read_text()), "test/accepted_nothing_by_judge": 0.75}
    (better / "metrics.json").write_text(json.dumps(judged))
    write_report(Path("reports"), "dilated-net-cifar10", 3000.0, 30)
    (folder / "reports/bench").mkdir()
    (folder / "reports/promotions").mkdir()
    decision = {"decision": "promoted", "text": "mnist (dynamic): version 2 is the new champion: a < b."}
    (folder / "reports/promotions/mnist.json").write_text(json.dumps(decision))
    assert steps.main(["compare"]) == 0
    assert capsys.readouterr().out == f"wrote {PAGE}\n"
    page = PAGE.read_text()

    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^">]*)', page)
    assert all(source.startswith("data:image/png;base64,") for source in sources), "nothing is loaded from elsewhere"
    pictures = [base64.b64decode(source.partition(",")[2]) for source in sources]
    assert len(pictures) == 3 * 2 + 2, "each pair's own, and the curves of each dataset in one"
    for report in (worse, better):
        assert (report / "samples.png").read_bytes() in pictures
        assert (report / "curve.png").read_bytes() in pictures

    cells = [re.findall("<td>(.*?)</td>", line) for line in page.splitlines() if line.startswith("<tr><td>")]
    assert [row[:4] for row in cells] == [
        ["gated_pixelcnn-mnist", "dynamic", "81.25 ± 0.50 nats", "81.25 ± 0.50 nats"],
        ["pixelcnn-mnist", "dynamic", "87.50 ± 0.50 nats", "87.50 ± 0.50 nats"],
        ["dilated-net-cifar10", "8-bit", "3.0000 ± 0.0005 bits/dim", "3.0000 ± 0.0005 bits/dim"],
    ], "the best of a dataset first, each score with its protocol"
    assert cells[0][4:] == ["0.75", "1,234", "2.5 min", "dvc repro full/dvc.yaml:evaluate@gated_pixelcnn-mnist"]
    assert cells[1][4] == "", "not judged"
    assert "Parameters and minutes are those of the network of the test column" in page
    assert "<b>promoted</b>: mnist (dynamic): version 2 is the new champion: a &lt; b." in page


def test_scores_of_other_data_than_those_of_now_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their protocol and unit may be others, too."""
    Path("dvc.lock").write_text("stages: {prepare@mnist: {outs: [{md5: abc}]}}")
    for model, told in (("pixelcnn", {"data_hash": "abc"}), ("gated_pixelcnn", {"data_hash": "old"}), ("before", {})):
        metrics = write_report(Path("reports"), f"{model}-mnist", 87.5, 10) / "metrics.json"
        metrics.write_text(json.dumps(json.loads(metrics.read_text()) | told))
    assert [report.row["pair"] for report in read_reports(Path("reports"))] == [
        "before-mnist",
        "pixelcnn-mnist",
    ]
    assert "gated_pixelcnn-mnist is left out: it was scored on other data" in caplog.text
    assert "Train it again: dvc repro full/dvc.yaml:evaluate@gated_pixelcnn-mnist" in caplog.text


def test_failures_are_on_the_page(folder: Path) -> None:
    page = write_comparison([], {"pixelcnn-mnist": "no <room>"}).read_text()
    assert "pixelcnn-mnist failed: no &lt;room&gt;" in page
    assert "<p>None yet.</p>" in page


def test_its_mistakes_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["compare"]) == 1
    assert capsys.readouterr().err == "compare: no pair has a report to compare. Train one: dvc repro\n"
    report = write_report(Path("reports"), "pixelcnn-mnist", 87.5, 10)
    (folder / "reports/promotions").mkdir()
    (folder / "reports/promotions/mnist.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"mnist\.json is no report of a promotion .* python -m pipelines.steps promote mnist"
    ):
        write_comparison(read_reports(Path("reports")))
    for damaged in ("{}", "[]"):
        (report / "metrics.json").write_text(damaged)
        with pytest.raises(
            ValueError, match=r"pixelcnn-mnist/metrics\.json has no readable scores .* dvc repro full/dvc"
        ):
            read_reports(Path("reports"))
    assert read_reports(Path("reports"), without=["pixelcnn-mnist"]) == []
    assert not PAGE.exists()
