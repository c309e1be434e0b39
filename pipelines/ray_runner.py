"""The same trainings on a Ray cluster, by Prefect's task runner for Ray (the extra `cluster` in pyproject.toml).

Every machine of the cluster needs the project in the folder of the same path, a shared disk say, and Python with the
project installed. A training is a process of its own there, too: what it does to itself it does not do to Ray.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from pipelines.train_all_flow import run_apart

# What a training on another machine must know from here; the rest of its environment is its own machine's.
PASSED_ON = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "BENTOML_HOME", "PIXELCNN_DATA", "OMP_NUM_THREADS", "PYTHONPATH")
POLL_S = 0.5


@task(name="train-apart", persist_result=False, cache_policy=NO_CACHE)
def _run_one(name: str, words: list[str], logs: str, folder: str, settings: dict[str, str]) -> dict[str, str]:
    """Run one command in the project's folder of this machine; return why it failed, by its name."""
    os.chdir(folder)
    return run_apart({name: [sys.executable, *words]}, 1, Path(logs), {**os.environ, **settings}, print)


def run_on_ray(
    commands: Mapping[str, Sequence[str]], at_once: int, logs: Path, environment: Mapping[str, str], where: str
) -> dict[str, str]:
    """Run commands on a Ray cluster, some at a time, in order; like `pipelines.train_all_flow.run_apart`.

    Args:
        where: `ray` for a cluster of its own, `auto` or `ray://HOST:PORT` for one that is there.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        import ray
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise ValueError("PIXELCNN_TASK_RUNNER asks for Ray: pip install -e '.[cluster]' first.") from None
    settings = {name: environment[name] for name in PASSED_ON if name in environment}
    address = None if where == "ray" else where

    @flow(name="train-on-ray", persist_result=False, task_runner=RayTaskRunner(address))
    def train_on_ray() -> dict[str, str]:
        waiting = dict(commands)
        running: dict[str, Any] = {}  # name -> a future of prefect-ray's
        failures: dict[str, str] = {}
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    name = next(iter(waiting))
                    words = list(waiting.pop(name))[1:]  # each machine has its own Python
                    get_run_logger().info("%s: begins, its log is %s", name, logs / f"{name}.log")
                    running[name] = _run_one.submit(name, words, str(logs), os.getcwd(), settings)
                for name, future in list(running.items()):
                    future.wait(timeout=POLL_S)
                    if not future.state.is_final():
                        continue
                    del running[name]
                    if future.state.is_completed():
                        failures |= future.result()
                    else:
                        failures[name] = f"its process on Ray ended: {future.state.message}"
                    get_run_logger().info("%s: %s", name, failures.get(name, "done"))
        finally:
            for future in running.values():
                ray.cancel(future.wrapped_future)  # interrupts the task, which stops its process
        return failures

    return train_on_ray()
