"""The command `dvc`: DVC itself, but `dvc repro` and `dvc exp run` without a target do the project's default targets.

DVC has no such setting: without a target it runs every stage of dvc.yaml, which here means training every pair on
every dataset. `dvc repro --all-pipelines` still does that.
"""

import io
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from pipelines.files import KEEPER_VARIABLE, remove_ended_states
from pipelines.params import PARAMS_FILE, load_params

_MODELS_FOLDER = Path("models")  # as in dvc.yaml
# Any of these says which stages are meant, as a target would.
_CHOOSERS = ("targets", "all_pipelines", "pipeline", "recursive", "run_all")


def with_default_targets(argv: Sequence[str]) -> list[str]:
    """Return a `dvc` command line with the default targets added where it names none.

    Args:
        argv: the words after `dvc`.

    Raises:
        ValueError: params.yaml, which names the default targets, is not as it should be.
    """
    from dvc.cli import DvcParserError, parse_args
    from dvc.commands.experiments.run import CmdExperimentsRun
    from dvc.commands.repro import CmdRepro

    argv = list(argv)
    try:
        # DVC parses again, and it is then that its help, or what it does not understand, is printed.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            logging.disable(logging.CRITICAL)
            args = parse_args(argv)
    except (DvcParserError, SystemExit):
        return argv
    finally:
        logging.disable(logging.NOTSET)
    if args.func not in (CmdRepro, CmdExperimentsRun) or any(getattr(args, name, None) for name in _CHOOSERS):
        return argv
    params_file = Path(args.cd) / PARAMS_FILE
    if not params_file.is_file():  # not this project
        return argv
    return argv + load_params(params_file).default_targets


def main() -> int:
    """Run `dvc`; return its exit code."""
    from dvc.cli import main as dvc_main

    # Stages call `python`: this one, whether or not its environment is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    given = sys.argv[1:]
    try:
        argv = with_default_targets(given)
    except ValueError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    if argv != given:
        added = argv[len(given) :]
        print(f"No target given: doing {', '.join(added)}, the default_targets of {PARAMS_FILE}.", file=sys.stderr)
    keeper = os.environ[KEEPER_VARIABLE] = uuid.uuid4().hex
    try:
        return dvc_main(argv)
    finally:
        remove_ended_states(_MODELS_FOLDER, keeper)


if __name__ == "__main__":
    sys.exit(main())
