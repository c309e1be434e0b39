"""A mistake in a benchmark's command line is one sentence."""

import os
import runpy
import sys

import pytest

from benchmarks.command import command
from tests.pipelines.projects import ROOT


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("endings", ["nowhere"]),
        ("drawings", ["nowhere"]),
        ("letters", ["nowhere"]),
        ("training", ["--checkpoint", "nowhere"]),
        ("watching", ["--champion", "nowhere"]),
    ],
)
def test_a_folder_that_is_not_there(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: ")
    assert "nowhere" in said
    assert said.count("\n") == 1


def test_what_ends_it_with_a_sentence_is_not_lost() -> None:
    def work() -> None:
        raise SystemExit("error: there is no browser.")

    with pytest.raises(SystemExit, match=r"error: there is no browser\."):
        command(work, [])
