"""The pipeline's commands: `python -m pipelines.steps prepare DATASET` and so on. DVC's stages call these.

A mistake of the person who calls is one sentence on stderr and exit code 1; a traceback is a bug of ours.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
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


def train(pair: str, out: str, report: str, state: str | None, half: bool, reuse: bool) -> None:
    """Run the training flow of a pair in this process."""
    from pixelcnn.data import load_dataset

    # Before the flow starts: what is wrong with settings or data is said at once, without a failed flow run.
    load_dataset(Path("data") / f"{load_params().pair(pair).dataset}.safetensors")
    from pipelines.training_flow import train_pair

    train_pair(pair, out, report, state, half, reuse)


def train_all(pairs: list[str], at_once: int, again: bool) -> None:
    """Train several pairs, each in a process of its own, and compare them."""
    load_params()
    from pipelines.train_all_flow import train_all as run_all

    run_all(pairs or None, at_once, again)


def compare() -> None:
    """Write reports/comparison.html: the trained pairs beside each other, from reports/."""
    from pipelines.comparison import REPORTS_FOLDER, read_reports, write_comparison

    print(f"wrote {write_comparison(read_reports(REPORTS_FOLDER))}")


def promote(dataset: str, dry_run: bool) -> None:
    """Let the best candidate of a dataset become champion, on evidence."""
    load_params()
    from pipelines.promotion_flow import promote as decide

    decide(dataset, dry_run)


def history(dataset: str) -> None:
    """Say who replaced whom as champion of a dataset, when, and by how much."""
    from pipelines.promotion_flow import history as lines

    for line in lines(dataset):
        print(line)


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
    """Make a picture and tables of reports/bench/*.json, the figures of `make bench`."""
    from pipelines.bench_plot import plot, read, tabulate

    folder = Path("reports/bench")
    results = read(folder)
    print(f"wrote {plot(results, folder)} and {tabulate(results, folder)}")


class _OneLine(logging.Filter):
    """Keep Prefect's log of a failed task or flow, without the traceback where a person is to mend the cause."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and is_for_user(record.exc_info[1]):
            record.exc_info = None
        return True


def is_for_user(error: BaseException | None) -> bool:
    """Say whether a person can mend what an error names; if not, it is a bug of ours."""
    if isinstance(error, RuntimeError) and "Failed to reach API" in str(error):  # Prefect, of the server it was told of
        return True
    return isinstance(error, _USER_ERRORS) or type(error).__module__.partition(".")[0] in _OUTSIDE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.steps", description="The pipeline's commands.")
    commands = parser.add_subparsers(dest="command", required=True)
    of_dataset = (prepare, promote, history, rollback)
    for function in (prepare, train, train_all, compare, promote, history, rollback, release, results, plot_bench):
        summary = (function.__doc__ or "").splitlines()[0]
        name = function.__name__
        aliases = [name.replace("_", "-")] if "_" in name else []
        command = commands.add_parser(name, aliases=aliases, help=summary, description=summary)
        command.set_defaults(function=function)
        if function in of_dataset:
            command.add_argument("dataset", help="e.g. mnist5k")
        if function is train:
            command.add_argument("pair", help="a pair of params.yaml, e.g. pixelcnn-mnist5k")
            command.add_argument("--out", required=True, help="folder of the checkpoint, replaced as a whole")
            command.add_argument("--report", required=True, help="folder of metrics, curve and sample sheet")
            command.add_argument("--state", help="folder of a training that is carried over days; it is kept")
            command.add_argument(
                "--half", action="store_true", help="store half-precision weights where they score alike"
            )
            command.add_argument(
                "--reuse", action="store_true", help="take a registered version of the same inputs instead of training"
            )
        if function is train_all:
            command.add_argument(
                "--again", action="store_true", help="train even what was trained from the same inputs"
            )
            command.add_argument(
                "pairs", nargs="*", metavar="PAIR", help="pairs of params.yaml; none for the quick start"
            )
            command.add_argument("--at-once", type=int, default=1, help="how many train at a time")
        if function is promote:
            command.add_argument("--dry-run", action="store_true", help="decide and say so, but move and write nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = vars(_parser().parse_args(argv))
    function, command = arguments.pop("function"), arguments.pop("command")
    return run(command, lambda: function(**arguments))


def run(command: str, work: Callable[[], None]) -> int:
    """Do the work of a command; return the exit code. What a person can mend becomes one sentence on stderr."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_OneLine())
    try:
        work()
    except Exception as error:
        if not is_for_user(error):
            raise
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
