"""What log lines, metrics and the watch on drawings cost an answer: `python -m benchmarks.watching`.

Two services of the same released champion, one with everything on (a challenger that scores drawings, too) and one with
PIXELCNN_WATCH=0, are asked by turns for the same completions. Printed is each one's p50, and the median of the paired
differences with its 95 % interval (bootstrap): single times vary by far more than what is measured.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import httpx
import numpy as np
from typer import Option, run

from app.client import ServiceClient
from benchmarks.service import body_of
from pipelines.registry import store
from pixelcnn.checkpoint import load_checkpoint, sha256_of
from tests.service.served import serving

DATASET = "mnist"
NUM_CANDIDATES = 4
WARM_UP = 20  # pairs that do not count


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


def main(
    pairs: Annotated[int, Option(help="requests of each service")] = 1000,
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
        taken: dict[bool, list[float]] = {True: [], False: []}
        for i in range(WARM_UP + pairs):
            body = body_of(DATASET, model, NUM_CANDIDATES, i, i)
            for watch in (True, False) if i % 2 else (False, True):
                start = time.perf_counter()
                services[watch].post("/complete", content=body).raise_for_status()
                taken[watch].append(time.perf_counter() - start)
        shadow = services[True].get("/drawings").json()[DATASET]["shadow"]
    on, off = taken[True][WARM_UP:], taken[False][WARM_UP:]
    differences = np.subtract(on, off)
    resampled = np.random.default_rng(0).choice(differences, (1000, len(differences)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    base = median(off)
    print(f"| {DATASET}, {NUM_CANDIDATES} candidates of a half, {len(on)} requests by turns | p50 |\n| --- | --- |")
    print(f"| all off (PIXELCNN_WATCH=0) | {1000 * base:.2f} ms |")
    shown = f"logs, metrics, drift, shadow ({shadow['drawings']} drawings scored by both)"
    print(f"| {shown} | {1000 * median(on):.2f} ms |")
    cells = [f"{1000 * value:.2f} ms ({100 * value / base:+.1f} %)" for value in (np.median(differences), low, high)]
    print(f"| paired difference: median, 95 % interval | {cells[0]}; {cells[1]} to {cells[2]} |")


if __name__ == "__main__":
    run(main)
