"""A trained model on disk: a folder of `config.json`, `model.safetensors` and `scores.json`. Never a pickle."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from pixelcnn.config import config_from_dict, config_to_dict
from pixelcnn.model import AutoregressiveModel, build_model

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SCORES_FILE = "scores.json"
CARD_FILE = "README.md"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(
    folder: str | Path,
    model: AutoregressiveModel,
    scores: dict[str, Any],
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write a model and its scores into a folder, which is replaced as a whole: no half-written one is ever seen.

    Args:
        folder: the folder to write; its parent is made if missing.
        model: as `build_model` makes it.
        scores: JSON-ready values, e.g. of `evaluate`.
        dtype: of the stored weights, e.g. torch.float16; None for the model's own. They are float32 again when loaded.
        card: text of a model card to keep with them, as `README.md`.

    Raises:
        ValueError: a weight lies outside the range of `dtype`.
        OSError: the folder cannot be written; one that was there before is left as it was.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        weights = {name: w.detach().to("cpu", dtype).contiguous() for name, w in model.state_dict().items()}
        if dtype is not None and not all(bool(weight.isfinite().all()) for weight in weights.values()):
            raise ValueError(f"a weight is too large for {dtype}. Store the model as it is.")
        try:
            save_file(weights, new / WEIGHTS_FILE)
        except safetensors.SafetensorError as error:
            raise OSError(f"{folder} could not be saved ({error}). Make room on its disk.") from None
        if card is not None:
            (new / CARD_FILE).write_text(card)
        config = {**config_to_dict(model.config), "weights_sha256": sha256_of(new / WEIGHTS_FILE)}
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        (new / SCORES_FILE).write_text(json.dumps(scores, indent=2, allow_nan=False) + "\n")
        shutil.copymode(new / SCORES_FILE, new / WEIGHTS_FILE)  # safetensors would keep it from everybody else
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_joint_weights(model: AutoregressiveModel, folder: str | Path) -> None:
    """Start a model with a context network from the weights of one without: it then is the same joint model.

    What the checkpoint has not, the context network and its projections, stays as it is; `build_model` makes the
    projections zero. A completer of the same width starts from the same weights.

    Args:
        model: as `build_model` makes it; changed in place.
        folder: a checkpoint of a network that differs in its context at most.

    Raises:
        ValueError: the folder is no checkpoint, or its network differs in more than its context.
    """
    source, _ = load_checkpoint(folder)
    wanted, found = config_to_dict(model.config), config_to_dict(source.config)
    for key, value in wanted.items():
        if not key.startswith(("context_", "completer")) and found.get(key) != value:
            raise ValueError(f"{folder} holds a network of {key} {found.get(key)!r}, the one to train has {value!r}.")
    weights = source.state_dict()
    for name, tensor in model.state_dict().items():
        if name in weights and weights[name].shape != tensor.shape:
            raise ValueError(f"{folder} holds a context network of other sizes. Start from a network without one.")
    model.load_state_dict(weights, strict=False)
    if source.completer is None:
        model.begin_completer()


def load_checkpoint(folder: str | Path) -> tuple[AutoregressiveModel, dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Returns:
        The model, in eval mode, on the CPU; and its scores.

    Raises:
        ValueError: a file is missing, damaged, of another architecture, or not the one that was saved.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / CONFIG_FILE).read_text())
        scores = json.loads((folder / SCORES_FILE).read_text())
        expected = values.pop("weights_sha256")
        found = sha256_of(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no checkpoint: {Path(error.filename).name} is missing.") from None
    except OSError as error:
        raise ValueError(f"{folder} is no checkpoint that can be read: {error.strerror}.") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder} is no checkpoint: {CONFIG_FILE} or {SCORES_FILE} is damaged ({error}).") from None
    if found != expected:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is not the file that was saved: its SHA-256 is {found[:12]}..., "
            f"{CONFIG_FILE} says {str(expected)[:12]}.... Fetch the checkpoint again."
        )
    model = build_model(config_from_dict(values))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {error}") from None
    return model.eval(), scores
