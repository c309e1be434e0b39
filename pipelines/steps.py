"""The pipeline's commands: `python -m pipelines.steps prepare DATASET` and so on. DVC's stages call these.

A mistake of the person who calls is one sentence on stderr and exit code 1; a traceback is a bug of ours.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.params import load_params

# What a person can mend: settings, data, a diverging training, files.
_USER_ERRORS = (ValueError, LookupError, FloatingPointError, OSError)
# What is wrong with a store or server; their own exceptions are no part of ours.
_OUTSIDE = ("mlflow", "prefect", "bentoml", "httpx", "requests", "sqlalchemy")

# Where a run without a Prefect server starts a temporary one, its chatter is of no use to anybody, and on a busy
# machine it needs more than the default of 20 s to come up.
_SETTINGS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "BENTOML_DO_NOT_TRACK": "True",
    "DO_NOT_TRACK": "1",
}


def prepare(dataset: str) -> None:
    """Write `data/DATASET.safetensors`."""
    from pipelines.prepare import prepare as write

    write(dataset, Path("data") / f"{dataset}.safetensors", load_params().data)


def train(pair: str, out: str, report: str, state: str | None, half: bool) -> None:
    """Run the training flow of a pair in this process."""
    from pixelcnn.data import load_dataset

    # Before the flow starts: what is wrong with settings or data is said at once, without a failed flow run.
    load_dataset(Path("data") / f"{load_params().pair(pair).dataset}.safetensors")
    from pipelines.training_flow import train_pair

    train_pair(pair, out, report, state, half)


def promote(dataset: str) -> None:
    """Let the best candidate of a dataset become champion, on evidence."""
    load_params()
    from pipelines.promotion_flow import promote as decide

    decide(dataset)


def rollback(dataset: str) -> None:
    """Make the previous champion of a dataset champion again."""
    from pipelines.promotion_flow import rollback as undo

    undo(dataset)


def release() -> None:
    """Register the weights of weights/PAIR/; they serve where a dataset has no champion yet."""
    from pipelines.release import release_all

    for text in release_all():
        print(text)


def results() -> None:
    """Write RESULTS.md from the scores in weights/PAIR/."""
    from pipelines.results import RESULTS_FILE, write_results

    write_results()
    print(f"wrote {RESULTS_FILE}")


def plot_bench() -> None:
    """Draw reports/bench/*.json, the figures of `make bench`, as reports/bench/bench.png."""
    from pipelines.bench_plot import plot

    print(f"wrote {plot(Path('reports/bench'))}")


class _OneLine(logging.Filter):
    """Keep Prefect's log of a failed task or flow, without the traceback where a person is to mend the cause."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and _is_for_user(record.exc_info[1]):
            record.exc_info = None
        return True


def _is_for_user(error: BaseException | None) -> bool:
    if isinstance(error, RuntimeError) and "Failed to reach API" in str(error):  # Prefect, of the server it was told of
        return True
    return isinstance(error, _USER_ERRORS) or type(error).__module__.partition(".")[0] in _OUTSIDE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.steps", description="The pipeline's commands.")
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (prepare, train, promote, rollback, release, results, plot_bench):
        summary = (function.__doc__ or "").splitlines()[0]
        command = commands.add_parser(function.__name__, help=summary, description=summary)
        command.set_defaults(function=function)
        if function is train:
            command.add_argument("pair", help="a pair of params.yaml, e.g. pixelcnn-mnist5k")
            command.add_argument("--out", required=True, help="folder of the checkpoint, replaced as a whole")
            command.add_argument("--report", required=True, help="folder of metrics, curve and sample sheet")
            command.add_argument("--state", help="folder of a training that is carried over days; it is kept")
            command.add_argument(
                "--half", action="store_true", help="store half-precision weights where they score alike"
            )
        elif function not in (release, results, plot_bench):
            command.add_argument("dataset", help="e.g. mnist5k")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    arguments = vars(_parser().parse_args(argv))
    function, command = arguments.pop("function"), arguments.pop("command")
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_OneLine())
    try:
        function(**arguments)
    except Exception as error:
        if not _is_for_user(error):
            raise
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
