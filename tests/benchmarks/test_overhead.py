"""What the tools cost is measured in a copy of the project."""

from pathlib import Path

import yaml

from benchmarks.overhead import COPIED
from tests.pipelines.projects import ROOT


def test_the_copy_has_what_the_stages_depend_on() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    deps = {dep for stage in stages.values() for dep in stage["deps"] if "$" not in dep}  # the others are outputs
    assert {dep for dep in deps if not any(Path(dep).is_relative_to(name) for name in COPIED)} == set()
