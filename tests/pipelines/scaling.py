"""The wall clock of train-all from 1 to 4 tiny pairs, on this machine's processes and on Ray.

    python -m tests.pipelines.scaling --at-once 2

It prints a table. Each figure is that of the whole command, `python -m pipelines.steps train-all`, with its temporary
Prefect server and, in the last column, its own Ray cluster; so the first pair pays for what all need.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does, for the helpers beside this file

from projects import copy_project, tiny_dataset

from pixelcnn.data import save_dataset

PAIRS = ("pixelcnn-mnist5k", "gated_pixelcnn-mnist5k", "pixelcnn-mnist", "gated_pixelcnn-mnist")


def train_all(folder: Path, num: int, at_once: int, runner: str) -> tuple[float, dict[str, float]]:
    """Train the first so many pairs in an empty project; return the seconds, and the pairs' test scores in nats."""
    folder.mkdir()
    copy_project(folder)
    for dataset in ("mnist5k", "mnist"):
        save_dataset(folder / "data" / f"{dataset}.safetensors", tiny_dataset(dataset))
    settings = {"PIXELCNN_TASK_RUNNER": runner, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    settings |= {"MLFLOW_TRACKING_URI": "", "PREFECT_API_URL": "", "PREFECT_HOME": str(folder / "prefect")}
    settings |= {"GIT_CEILING_DIRECTORIES": str(folder.parent), "RAY_USAGE_STATS_ENABLED": "0"}
    words = ["-m", "pipelines.steps", "train-all", *PAIRS[:num], "--at-once", str(at_once)]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    took = time.monotonic() - start
    if done.returncode != 0:
        raise SystemExit(f"train-all of {num} pairs with {runner} failed: {done.stderr.strip()[-2000:]}")
    metrics = folder.glob("models/deployments/*/reports/*/metrics.json")
    return took, {path.parent.name: json.loads(path.read_text())["test/nll_nats"] for path in metrics}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pipelines.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--at-once", type=int, default=2, help="how many train at a time")
    parser.add_argument("--runners", nargs="+", default=["local", "ray"], choices=["local", "ray"])
    arguments = parser.parse_args()
    print(f"| pairs | {' | '.join(arguments.runners)} | scores |\n| --- |{' --- |' * len(arguments.runners)} --- |")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as top:
        for num in range(1, len(PAIRS) + 1):
            found = [train_all(Path(top) / f"{r}{num}", num, arguments.at_once, r) for r in arguments.runners]
            equal = all(scores == found[0][1] and len(scores) == num for _, scores in found)
            times = " | ".join(f"{seconds:.1f} s" for seconds, _ in found)
            print(f"| {num} | {times} | {'the same' if equal else 'DIFFER'} |", flush=True)


if __name__ == "__main__":
    main()
