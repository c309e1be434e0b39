"""Faults on purpose: processes killed at their worst moments, full disks, servers away; then one rerun, and a check.

    python -m tools.faults --times 10              # the cases that take seconds
    python -m tools.faults --times 1 --slow        # and those with real servers

It prints a table: the fault, how often it was made, and after how many nothing was wrong. Wrong are: a version that is
registered twice or not whole, an alias on a version that is not there, a served model that is not the champion, a run
or decision that seems to be under way for ever, what lineage --verify finds, and files left behind.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from pipelines.registry import runs as tracking
from tests.pipelines.toys import INK, Toy
from tools.faults import kills, servers
from tools.faults.check import DATASET, check


@contextmanager
def fresh_folder(database: Path) -> Iterator[None]:
    """Work in an empty folder, with a new database and a new model store."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, chdir(folder):
        shutil.copy(database, "mlflow.db")
        os.environ |= {"BENTOML_HOME": f"{folder}/bentoml", "MLFLOW_TRACKING_URI": ""}
        os.environ["GIT_CEILING_DIRECTORIES"] = str(Path(folder).parent)
        yield


def new_database(folder: Path) -> Path:
    """Make an MLflow database once: its schema takes seconds. What is imported here need not be in every fork."""
    os.chdir(folder)
    os.environ |= {"BENTOML_HOME": f"{folder}/bentoml", "MLFLOW_TRACKING_URI": ""}
    tracking.client()
    shutil.copy("mlflow.db", "new.db")
    toy = Toy(DATASET, folder)
    toy.train(INK)
    toy.promote()
    check(toy.name, num_versions=1, num_runs=1)
    return folder / "new.db"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=1, help="how often each fault is made")
    parser.add_argument("--slow", action="store_true", help="also the cases with real servers, minutes each")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    cases = kills.cases()
    if arguments.slow:
        cases |= servers.cases()
    if not any(arguments.only in name for name in cases):
        parser.error(f"no case has {arguments.only!r} in its name: name one of {', '.join(cases)}, or add --slow.")
    failed = 0
    print("| fault | times | nothing wrong after one rerun |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        database = new_database(Path(folder))
        for name, case in cases.items():
            if arguments.only not in name:
                continue
            right = 0
            for _ in range(arguments.times):
                with fresh_folder(database):
                    try:
                        case()
                        right += 1
                    except AssertionError as error:
                        print(f"{name}: {error}", file=sys.stderr)
            failed += arguments.times - right
            print(f"| {name} | {arguments.times} | {right} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
