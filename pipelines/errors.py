"""What is told of an error: whether a person can mend it, its whole reason in one line, and how a command ends."""

import logging
import os
import re
import sys
from collections.abc import Sequence
from urllib.request import getproxies_environment

from typer import Typer
from typer.main import get_command

# Settings, data, a training that diverges or finds no memory, files. A LookupError of ours says what is missing; its
# subclasses, KeyError and IndexError, are bugs.
_USER_ERRORS = (ValueError, FloatingPointError, MemoryError, OSError)
# What is wrong with a store, a server or a file; their own exceptions are no part of ours.
_OUTSIDE = ("mlflow", "prefect", "bentoml", "httpx", "requests", "sqlalchemy", "sqlite3", "safetensors")
_SHOWN = ("pipelines.stages", "pixelcnn.evaluation")  # loggers
_MAX_CHARACTERS = 400  # of a reason: MLflow's hold whole statements of SQL

_UNREACHABLE = "Failed to reach API"  # Prefect's RuntimeError, of the server that it was told of

# Where a run without a Prefect server starts a temporary one, its chatter is of no use to anybody, and on a busy
# machine it needs more than the default of 20 s to come up.
_SETTINGS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "DO_NOT_TRACK": "1",
}


def is_for_user(error: BaseException | None) -> bool:
    """Say whether a person can mend what an error names; if not, it is a bug of ours."""
    is_unreachable = isinstance(error, RuntimeError) and _UNREACHABLE in str(error)
    return is_unreachable or isinstance(error, _USER_ERRORS) or type(error) is LookupError or tool_of(error) is not None


def tool_of(error: BaseException | None) -> str | None:
    """Return the package of a tool that raised an error, such as `mlflow`; None for Python's errors and ours."""
    package = type(error).__module__.partition(".")[0]
    return package if package in _OUTSIDE else None


def without_passwords(text: str) -> str:
    """Return a text in which addresses have no name and password any more: it is told, logged and kept."""
    return re.sub(r"(?<=://)([^/\s]*|[^:/@\s]*:[^@\s]*)@", "", text)  # a password may hold a slash


def reason(error: BaseException) -> str:
    """Return an error's text in one line; a long one loses its middle, for causes stand at the end."""
    text = without_passwords(" ".join(str(error).split())) or type(error).__name__
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[: _MAX_CHARACTERS // 2]} ... {text[-_MAX_CHARACTERS // 2 :]}"


def reason_or_raise(error: Exception) -> str:
    """Return the `reason` of an error that is handled, if it is for a person to mend; a bug of ours is raised again."""
    if not is_for_user(error):
        raise error
    return reason(error)


def one_line(record: logging.LogRecord) -> bool:
    """Keep a line of Prefect's log, without passwords, and without the traceback where a person mends the cause."""
    record.msg, record.args = without_passwords(record.getMessage()), ()
    if record.exc_info and is_for_user(record.exc_info[1]):
        record.exc_info = None
    return True


def run_typer(app: Typer, name: str, program: str, argv: Sequence[str] | None) -> int:
    """Run a command line, called as its `program`, by this process's words if `argv` is None; return its exit code.

    What a person can mend is one sentence on stderr, which begins with `name`.
    """
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    if proxies := getproxies_environment():  # not for Prefect's own server, which is a neighbour
        direct = [*filter(None, [proxies.get("no")]), "127.0.0.1", "localhost"]
        os.environ["no_proxy"] = ",".join(dict.fromkeys(direct))
    # What the stages log, and how far a scoring is; inside a flow stages log by way of Prefect.
    loggers, handler = [logging.getLogger(shown) for shown in _SHOWN], logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        get_command(app)(argv, prog_name=program)
        return 0
    except SystemExit as end:  # typer's way to end a command
        if isinstance(end.code, str):  # somebody else's, who says why
            raise
        return int(end.code or 0)
    except Exception as error:
        if not is_for_user(error):
            raise
        text = f"{error.filename}: {error.strerror}." if isinstance(error, OSError) and error.filename else str(error)
        text = reason(error) if tool_of(error) else without_passwords(" ".join(text.split()))
        if _UNREACHABLE in text:
            text = f"{text.rstrip('.')}. Start that server (make operate), or unset PREFECT_API_URL to run without one."
        print(f"{name}: {text}", file=sys.stderr)
        return 1
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
