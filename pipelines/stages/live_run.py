"""The MLflow run of a training that is under way."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.errors import reason
from pipelines.files import atomic_write
from pipelines.registry import runs as tracking
from pipelines.registry.runs import Training

RUN_ID_FILE, RUN_KEY_FILE = "run_id", "run_key"  # beside the training's state
TRACKER_PAUSE_S = 300.0  # after the tracking store failed, until the training tries it again


class LiveRun:
    """Shows a training in MLflow while it goes on.

    A store that fails costs the training nothing but a warning: what it missed is logged later, at the latest when the
    result is registered. The run's ID lies beside the state, so that a training that was stopped goes on with its run.
    """

    def __init__(self, folder: Path, training: Training, log: Callable[[str], object]) -> None:
        """Begin the run, or go on with the one that a stopped training began in the folder of its state."""
        self._path, self._training, self._log = folder / RUN_ID_FILE, training, log
        self.run_id = self._path.read_text() if self._path.exists() else ""
        key = folder / RUN_KEY_FILE
        if not key.exists():
            atomic_write(key, uuid.uuid4().hex)
        self._key = key.read_text()
        self._started, self._silent_until = False, 0.0
        self._monitor: Any = None
        self._try(self._start)

    def _start(self) -> None:
        if not self._started:
            self.run_id = tracking.start_training_run(self._training, self._key, self.run_id)
            atomic_write(self._path, self.run_id)
            self._started = True
            self._monitor = tracking.monitor_machine(self.run_id)

    def show(self, rows: list[dict[str, float]], sheet: Path | None) -> None:
        """Log the curve so far, and the newest sheet of samples if there is one."""

        def log_both() -> None:
            self._start()
            tracking.log_curve(self.run_id, rows)
            if sheet is not None:
                tracking.client().log_artifact(self.run_id, str(sheet), "samples")

        self._try(log_both)

    def end(self, error: BaseException | None = None) -> None:
        """Show that the training has ended; or failed, or was stopped from outside, by an error."""
        if self._monitor is not None:
            self._monitor.finish()
        if self._started:
            self._silent_until = 0.0  # there is no later try
            status = "FAILED" if isinstance(error, Exception) else "KILLED" if error else "FINISHED"
            self._try(lambda: tracking.client().set_terminated(self.run_id, status))

    def _try(self, work: Callable[[], object]) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            work()
        except Exception as error:
            self._silent_until = time.monotonic() + TRACKER_PAUSE_S
            self._log(f"MLflow failed ({reason(error)}). The training goes on; its run shows it later.")
