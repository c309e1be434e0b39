"""What log lines, metrics and the watch on drawings cost an answer: `python -m benchmarks.watching`.

Two services of the same released champion, one with everything on (a challenger that scores drawings, too) and one with
PIXELCNN_WATCH=0, are asked by turns for the same completions, eight at a time: every fourth drawing is scored after its
answer, while the next request waits, which must be one to the same service. Printed is the median of each one's means
of eight, and that of their paired differences with its 95 % interval (bootstrap): single times vary by far more than
what is measured.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Annotated

import httpx
import numpy as np
from typer import Option

from app.client import ServiceClient
from benchmarks.command import command
from benchmarks.service import body_of
from pipelines.registry import store
from pixelcnn.checkpoint import load_checkpoint, sha256_of
from tests.service.served import serving

DATASET = "mnist"
NUM_CANDIDATES = 4
BLOCK = 8  # requests, of which two drawings are scored
REST_S = 0.5  # after a block: nothing of it is left for the other service's
WARM_UP = 3  # blocks of each service that do not count


def put_champion(pair: str, version: str) -> str:
    """Put a released pair into the store, with a reference; return its tag."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / pair
        shutil.copytree(Path("weights") / pair, checkpoint)
        _, scores = load_checkpoint(checkpoint)
        values = [i / 200 for i in range(200)]
        reference = dict.fromkeys(("bits_per_dim", "ink_share", "known_share"), values)
        (checkpoint / "beginnings.json").write_text(json.dumps(reference))
        weights = sha256_of(checkpoint / "model.safetensors")
        told = {"name": f"pixelcnn-{DATASET}", "version": version, "run_id": "none", "git_commit": "none"}
        told |= {"data_hash": scores["data_hash"], "weights_sha256": weights, "dataset": DATASET}
        return store.export(checkpoint, {**told, "label_names": scores["label_names"], "protocol": scores["protocol"]})


def block_means(ask: Callable[[bool, int], float], num: int) -> dict[bool, list[float]]:
    """Return the mean seconds of `num` blocks of each service, with the watch and without, by turns.

    Args:
        ask: sends a service the request of a number; returns the seconds to its answer.
    """
    for watch in (True, False):  # so that what is scored is never the last of a block
        ask(watch, 0)
    taken: dict[bool, list[float]] = {True: [], False: []}
    for block in range(WARM_UP + num):
        for watch in (True, False) if block % 2 else (False, True):
            taken[watch].append(mean(ask(watch, 1 + block * BLOCK + i) for i in range(BLOCK)))
            time.sleep(REST_S)
    return {watch: means[WARM_UP:] for watch, means in taken.items()}


def main(
    blocks: Annotated[int, Option(help=f"of each service, of {BLOCK} requests", min=2)] = 125,
    champion: str = "gated_pixelcnn-mnist",
    challenger: str = "pixelcnn-mnist",
) -> None:
    """Print what the watch costs."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["BENTOML_HOME"] = str(home)
        store.serve(put_champion(champion, "1"))
        store.serve(put_champion(challenger, "2"), "challenger")
        services: dict[bool, httpx.Client] = {}
        for watch in (True, False):
            served = stack.enter_context(serving(home, home / f"log-{watch}", PIXELCNN_WATCH=str(int(watch))))
            json_body = {"Content-Type": "application/json"}
            http = httpx.Client(base_url=served.url, headers=json_body, timeout=60, trust_env=False)
            services[watch] = stack.enter_context(http)
        model = ServiceClient(str(services[True].base_url)).models()[DATASET]

        def ask(watch: bool, number: int) -> float:
            body = body_of(DATASET, model, NUM_CANDIDATES, number, number)
            start = time.perf_counter()
            services[watch].post("/complete", content=body).raise_for_status()
            return time.perf_counter() - start

        taken = block_means(ask, blocks)
        shadow = services[True].get("/drawings").json()[DATASET]["shadow"]
    on, off = taken[True], taken[False]
    differences = np.subtract(on, off)
    resampled = np.random.default_rng(0).choice(differences, (1000, len(differences)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    base = median(off)
    head = f"{DATASET}, {NUM_CANDIDATES} candidates of a half, {len(on)} blocks of {BLOCK} by turns"
    print(f"| {head} | mean of a block, median |\n| --- | --- |")
    print(f"| all off (PIXELCNN_WATCH=0) | {1000 * base:.2f} ms |")
    shown = f"logs, metrics, drift, shadow ({shadow['drawings']} drawings scored by both)"
    print(f"| {shown} | {1000 * median(on):.2f} ms |")
    cells = [f"{1000 * value:.2f} ms ({100 * value / base:+.1f} %)" for value in (np.median(differences), low, high)]
    print(f"| paired difference: median, 95 % interval | {cells[0]}; {cells[1]} to {cells[2]} |")


if __name__ == "__main__":
    sys.exit(command(main))
