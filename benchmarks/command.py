"""A benchmark's function as a command line."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from typer import Typer

from pipelines.errors import run_typer


def command(work: Callable[..., None], argv: Sequence[str] | None = None) -> int:
    """Run a function by a command line's words, this process's if None; return the exit code."""
    app, name = Typer(add_completion=False), Path(inspect.getfile(work)).stem
    app.command()(work)
    return run_typer(app, name, f"python -m benchmarks.{name}", argv)
