"""The state file of a training run: one safetensors file of tensors, with everything else as JSON in its metadata."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pixelcnn.data import DAMAGED, load_tensors


@dataclass(kw_only=True)
class RunState:
    """What a run needs to go on, beside its tensors."""

    description: dict[str, Any]  # what the run that resumes it must share with it
    step: int  # optimizer steps done
    elapsed_s: float  # seconds of training, all resumed runs together
    best_nll: float | None  # lowest validation score so far, nats per image; None before the first
    phases: list[dict[str, Any]]  # settings that may change when a run goes on, each with its first step: `from_step`
    objective: str = ""  # what `best_nll` measures; scores of different objectives do not compare


def read_state(path: Path) -> tuple[RunState, dict[str, Tensor]]:
    """Read a state file, and its tensors by name.

    Raises:
        ValueError: the file is damaged, or no state of a run.
    """
    try:
        values, tensors = load_tensors(path, "state")
        return RunState(**values), tensors
    except DAMAGED as error:
        raise ValueError(f"{path} is no state of a training run ({error}). Delete it to start afresh.") from None
