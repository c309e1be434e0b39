"""The wall clock of train-all from 1 to 4 tiny pairs, one at a time and several.

    python -m benchmarks.train_all --at-once 1 2

It prints a table. Each figure is that of the whole command, `python -m pipelines.steps train-all`, with its temporary
Prefect server; so the first pair pays for what all need.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pixelcnn.data import save_dataset
from tests.pipelines.projects import copy_project, tiny_dataset

PAIRS = ("pixelcnn-mnist5k", "gated_pixelcnn-mnist5k", "pixelcnn-mnist", "gated_pixelcnn-mnist")


def train_all(folder: Path, num: int, at_once: int) -> tuple[float, dict[str, float]]:
    """Train the first so many pairs in an empty project; return the seconds, and the pairs' test scores in nats."""
    folder.mkdir()
    copy_project(folder)
    for dataset in ("mnist5k", "mnist"):
        save_dataset(folder / "data" / f"{dataset}.safetensors", tiny_dataset(dataset))
    settings = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    settings |= {"MLFLOW_TRACKING_URI": "", "PREFECT_API_URL": "", "PREFECT_HOME": str(folder / "prefect")}
    settings |= {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    words = ["-m", "pipelines.steps", "train-all", *PAIRS[:num], "--at-once", str(at_once)]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    took = time.monotonic() - start
    if done.returncode != 0:
        raise SystemExit(f"train-all of {num} pairs failed: {done.stderr.strip()[-2000:]}")
    metrics = folder.glob("models/deployments/*/reports/*/metrics.json")
    return took, {path.parent.name: json.loads(path.read_text())["test/nll_nats"] for path in metrics}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_all", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--at-once", type=int, nargs="+", default=[1, 2], help="how many train at a time; a column each"
    )
    arguments = parser.parse_args()
    columns = [f"{at_once} at once" for at_once in arguments.at_once]
    print(f"| pairs | {' | '.join(columns)} | scores |\n| --- |{' --- |' * len(columns)} --- |")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as top:
        for num in range(1, len(PAIRS) + 1):
            found = [train_all(Path(top) / f"{at_once}-{num}", num, at_once) for at_once in arguments.at_once]
            equal = all(scores == found[0][1] and len(scores) == num for _, scores in found)
            times = " | ".join(f"{seconds:.1f} s" for seconds, _ in found)
            print(f"| {num} | {times} | {'the same' if equal else 'DIFFER'} |", flush=True)


if __name__ == "__main__":
    main()
