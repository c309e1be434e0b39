"""What the tools around a training cost: the same training without and with MLflow, Prefect and DVC, each measured.

    python -m benchmarks.overhead                 # the quick start's pixelcnn-mnist5k, half a minute of training
    python -m benchmarks.overhead --epochs 1      # less of it: what the tools cost hardly depends on that

Each line is a process of its own, in an empty folder. Processor seconds (of it and all that it started) tell more than
those of the clock where a machine has other work. Prefect's server runs and MLflow's database exists, as where people
work; the last line is the first training on a fresh machine, which has to make both.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import yaml
from typer import Argument, Option

from benchmarks.command import command
from benchmarks.packing import timed
from pipelines.params import PARAMS_FILE, load_params
from tests.local import stop
from tests.pipelines.projects import copy_project, write_params
from tests.pipelines.sites import Site

TRAINING_S = 60.0  # what the percentage is of

FIT = """
import sys
from pathlib import Path
import torch
from pipelines.params import load_params
from pixelcnn import build_model, fit, load_dataset, save_checkpoint
pair = load_params().pair(sys.argv[1])
torch.set_num_threads(pair.num_threads or torch.get_num_threads())
data = load_dataset(Path("data") / f"{pair.dataset}.safetensors")
torch.manual_seed(pair.train.seed)
model = build_model(pair.network)
fit(model, data, pair.train)
save_checkpoint("out", model, {})
"""
# The stages' own functions, and nothing for MLflow.
WORK = """
import sys
from pipelines.stages import evaluate, train
class Unseen:
    run_id = None
    def __init__(self, *args): pass
    def show(self, *args): pass
    def end(self, failed=False): pass
train.LiveRun = Unseen
train.train(sys.argv[1])
evaluate.evaluate(sys.argv[1])
"""
# What DVC is for, and then the registry.
REPRO = """
import subprocess, sys
pair = sys.argv[1]
stages = [f"train@{pair}", f"evaluate@{pair}"]
subprocess.run([sys.executable, "-m", "dvc", "repro", "--single-item", *stages], check=True)
subprocess.run([sys.executable, "-m", "pipelines.steps", "register", pair], check=True)
"""


WITHOUT_TOOLS = 1  # the line of the table that those below it are compared with


def main(
    pair: Annotated[str, Argument(help="of params.yaml, with prepared data")] = "pixelcnn-mnist5k",
    epochs: Annotated[float | None, Option(help="of the training; those of params.yaml if it is left out")] = None,
) -> None:
    """Train in five ways; say what each costs: scores beside `fit` alone, each tool beside those without tools."""
    dataset = load_params().pair(pair).dataset
    flow = ("-m", "pipelines.steps", "train-pair", pair)
    lines = (  # what is done, by which command, and what that adds to the work
        ("`fit` alone: load, train, save", ("-c", FIT, pair), ""),
        ("with scores, reports and pictures", ("-c", WORK, pair), ""),
        ("with DVC and MLflow: `dvc repro`, `register`", ("-c", REPRO, pair), "DVC and MLflow"),
        ("with Prefect and MLflow: `train-pair`", flow, "Prefect and MLflow"),
        ("the same on a fresh machine", flow, "On a fresh machine"),
    )
    print("| training | clock | processor | added, processor |\n| --- | --- | --- | --- |")
    found: list[float] = []  # seconds of the processor
    with tempfile.TemporaryDirectory() as top, ExitStack() as stack:
        site = Site(Path(top))  # whose Prefect server all but the last use
        stack.callback(stop, site.start("server", "start", "--host", "127.0.0.1", "--port", str(site.port)))
        site.wait_until_healthy()
        for number, (name, words, _) in enumerate(lines):
            folder, is_fresh = Path(top) / str(number), number == len(lines) - 1
            _write_project(folder, pair, dataset, epochs)
            environment = {**os.environ, "PYTHONPATH": str(folder), "MLFLOW_TRACKING_URI": ""}
            environment |= {"PREFECT_HOME": str(folder / "prefect"), "GIT_CEILING_DIRECTORIES": top}
            environment["PREFECT_API_URL"] = "" if is_fresh else site.environment["PREFECT_API_URL"]
            if not is_fresh:
                _python(folder, environment, "-c", "from pipelines.registry import runs; runs.client()")
            start = time.monotonic()
            _, spent_s = timed(partial(_python, folder, environment, *words))
            added = f"{spent_s - found[min(number - 1, WITHOUT_TOOLS)]:+.1f} s" if found else ""
            print(f"| {name} | {time.monotonic() - start:.1f} s | {spent_s:.1f} s | {added} |", flush=True)
            found.append(spent_s)
    for (_, _, tools), spent_s in zip(lines, found, strict=True):
        if tools:
            tools_s = spent_s - found[WITHOUT_TOOLS]
            print(f"{tools}: {tools_s:.1f} processor seconds, {100 * tools_s / TRAINING_S:.0f} % of a 60 s training.")


def _python(folder: Path, environment: dict[str, str], *words: str) -> None:
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"a measured command failed: {done.stderr.strip()[-1000:]}")


def _write_project(folder: Path, pair: str, dataset: str, epochs: float | None) -> None:
    copy_project(folder)
    (folder / "data").mkdir()
    shutil.copy(f"data/{dataset}.safetensors", folder / "data")
    values = yaml.safe_load(Path(PARAMS_FILE).read_text())
    train = values["pairs"][pair]["train"]
    train.pop("max_minutes", None)  # the same steps in each, however busy the machine is
    train |= {"max_epochs": epochs} if epochs is not None else {}
    write_params(folder, values)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


if __name__ == "__main__":
    sys.exit(command(main))
