"""The state file of a training run: one safetensors file of tensors, with everything else as JSON in its metadata."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor


@dataclass(kw_only=True)
class RunState:
    """What a run needs to go on, beside its tensors."""

    description: dict[str, Any]  # what the run that resumes it must share with it
    step: int  # optimizer steps done
    elapsed_s: float  # seconds of training, all resumed runs together
    best_nll: float  # lowest validation score so far, nats per image; infinite before the first
    phases: list[dict[str, Any]]  # settings that may change when a run goes on, each with its first step: `from_step`
    objective: str = ""  # what `best_nll` measures; scores of different objectives do not compare


def write_state(path: Path, state: RunState, tensors: dict[str, Tensor]) -> None:
    """Write a state file, by way of a temporary one beside it.

    Raises:
        OSError: it could not be written; the file that was there before is untouched.
    """
    values = asdict(state)
    values["best_nll"] = state.best_nll if math.isfinite(state.best_nll) else None  # JSON has no infinity
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    try:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, {"state": json.dumps(values)})
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"{path} could not be saved ({error}). Make room on its disk, then run the same command again: "
            "the state that was saved before is untouched, and the run goes on from it."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path: Path) -> tuple[RunState, dict[str, Tensor]]:
    """Read what `write_state` wrote.

    Raises:
        ValueError: the file is damaged, or no state of a run.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a dict
        best_nll = values["best_nll"]
        state = RunState(**{**values, "best_nll": math.inf if best_nll is None else best_nll})
    except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no state of a training run ({error}). Delete it to start afresh.") from None
    return state, tensors


def training_history(state_file: str | Path) -> tuple[float, list[dict[str, Any]]]:
    """Return the minutes of training behind a state file, over all runs that resumed it, and the phases (`RunState`).

    Raises:
        ValueError: the file is damaged, or no state of a run.
    """
    state, _ = read_state(Path(state_file))
    return state.elapsed_s / 60, state.phases
