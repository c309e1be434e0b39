"""A trained model on disk: a folder of `config.json`, `model.safetensors` and `scores.json`. Never a pickle."""

import hashlib
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load

from pixelcnn.data import save_tensors
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.registry import build_model, config_from_dict, config_to_dict, count_weights

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SCORES_FILE = "scores.json"
CARD_FILE = "README.md"
OWN_FILES = {CONFIG_FILE, WEIGHTS_FILE, SCORES_FILE, CARD_FILE}  # of a checkpoint
# Where released weights lie: in an installed package, and beside the code in a clone.
_RELEASED = (Path(__file__).with_name("weights"), Path(__file__).parents[1] / "weights")
MAX_READS = 10  # of a checkpoint that is replaced each time while it is read
MAX_SHARING = 200  # layers that may share their weights; from more no sampler follows
MAX_REASON = 1000  # characters of torch's, which names each weight that is missing
# What a checkpoint's folder may hold beside these: the curves of its training, and pictures.
_BESIDE = (".csv", ".png")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def released() -> dict[str, Path]:
    """Return the folder of each checkpoint that was released with this code, by its name, MODEL-DATASET."""
    files = [file for place in _RELEASED for file in sorted(place.glob(f"[!.]*/{CONFIG_FILE}"))]  # none half-written
    return {file.parent.name: file.parent for file in files}


def check_replaceable(folder: str | Path) -> None:
    """Raise ValueError unless nobody would miss a folder: it is absent, empty, or a checkpoint and nothing else."""
    folder = Path(folder)
    if not folder.exists():
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["other things"]
    foreign = [name for name in names if name not in OWN_FILES and not name.endswith(_BESIDE)]
    try:
        is_ours = "weights_sha256" in json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError, TypeError):
        is_ours = False
    if foreign or (names and not is_ours):
        raise ValueError(
            f"{folder} is no checkpoint that may be replaced: it holds {(foreign or names)[0]}, which would be lost. "
            "Name an empty folder, or one that is not there yet."
        )


def save_checkpoint(
    folder: str | Path,
    model: AutoregressiveModel,
    scores: dict[str, Any],
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write a model and its scores into a folder, which is replaced as a whole: no half-written one is ever seen.

    The new folder `.NAME.new` is written first; then the old one is renamed to `.NAME.old`, the new one to NAME, and
    the old one removed. Killed between the two renames, a save leaves no NAME: `load_checkpoint` then reads
    `.NAME.old`.

    Args:
        model: as `build_model` makes it, also after `torch.compile`.
        scores: JSON-ready values, e.g. of `evaluate`.
        dtype: of the stored weights, e.g. torch.float16; None for the model's own. Half precision is float32 again when
            loaded.
        card: text of a model card to keep with them, as `README.md`.

    Raises:
        ValueError: a weight lies outside the range of `dtype`; the scores are none; or the folder is there and no
            checkpoint.
        OSError: the folder cannot be written; one that was there before is left as it was.
    """
    check_replaceable(folder)
    try:
        text = json.dumps(dict(scores), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"scores must be values that JSON has, by name ({error}).") from None
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped: the names of its weights are loaded
    folder = Path(folder).resolve()  # a link stays one: what it leads to is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        # Copies: layers may share their weights, which safetensors refuses.
        weights = {name: weight.to("cpu", dtype, copy=True) for name, weight in model.state_dict().items()}
        if dtype is not None and not all(bool(weight.isfinite().all()) for weight in weights.values()):
            raise ValueError(f"a weight is too large for {dtype}. Store the model as it is.")
        save_tensors(new / WEIGHTS_FILE, weights)
        if card is not None:
            (new / CARD_FILE).write_text(card)
        config = {**config_to_dict(model.config), "weights_sha256": sha256_of(new / WEIGHTS_FILE)}
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        (new / SCORES_FILE).write_text(text)
        old = _set_aside(folder)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        # Otherwise `old`, if it is there, is the only checkpoint: a save was killed between its renames.
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OSError(f"{folder} could not be saved: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Return where `save_checkpoint` keeps a folder while it puts the new one in its place."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.old")


def _current(folder: Path) -> tuple[Path, int, int]:
    """Return where the checkpoint lies at this moment, and what changes when another folder takes that place."""
    for place in (folder, _set_aside(folder)):
        with suppress(OSError):
            status = place.stat()
            return place, status.st_ino, status.st_ctime_ns
    return folder, 0, 0


def load_joint_weights(model: AutoregressiveModel, folder: str | Path) -> None:
    """Start a model from a checkpoint; ValueError if it differs in more than context, completer and label network.

    What the checkpoint has not, the context network and its projections, stays as it is; `build_model` makes the
    projections zero. A completer of the same width starts from the same weights.
    """
    source, _ = load_checkpoint(folder)
    found, weights = config_to_dict(source.config), source.state_dict()
    for key, value in config_to_dict(model.config).items():
        if not key.startswith(("context_", "completer", "added_", "label_")) and found.get(key) != value:
            raise ValueError(f"{folder} holds a network of {key} {found.get(key)!r}, the one to train has {value!r}.")
    if any(name in weights and weights[name].shape != tensor.shape for name, tensor in model.state_dict().items()):
        raise ValueError(f"{folder} holds a context or label network of other sizes. Start from a network without.")
    model.load_state_dict(weights, strict=False)
    if source.completer is None:
        model.begin_completer()


def load_with_hash(folder: str | Path) -> tuple[AutoregressiveModel, dict[str, Any], str]:
    """Read what `load_checkpoint` reads, and return the SHA-256 of the weights beside the model and its scores."""
    folder = Path(folder)
    if not _current(folder)[0].exists():
        folder = released().get(str(folder), folder)
    folder, (config, scores_text, weights) = _read_files(folder)
    try:
        values, scores = json.loads(config), dict(json.loads(scores_text))
        expected = values.pop("weights_sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder} is no checkpoint: {CONFIG_FILE} or {SCORES_FILE} is damaged ({error}).") from None
    found = hashlib.sha256(weights).hexdigest()
    if found != expected:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is not the file that was saved: its SHA-256 is {found[:12]}..., "
            f"{CONFIG_FILE} says {ascii(str(expected)[:12])[1:-1]}.... Fetch the checkpoint again."
        )
    model_config = config_from_dict(values)
    try:
        tensors = load(weights)
        num_weights = sum(tensor.numel() for tensor in tensors.values())
        # A mixture has any number of levels. A layer takes memory before it has weights; some may share their tensors.
        most = dict.fromkeys(("num_layers", "num_blocks"), max(len(tensors), MAX_SHARING))
        most |= {"num_levels": sys.maxsize} if model_config.num_mixtures else {}
        is_large = any(isinstance(size, int) and size > most.get(name, num_weights) for name, size in values.items())
        if is_large or count_weights(model_config) > num_weights:
            raise OverflowError(
                f"a network of these sizes has more than its {num_weights:,} weights in {len(tensors)} tensors"
            )
        model = build_model(model_config)
        if all(tensor.dtype == torch.float64 for tensor in tensors.values()):
            model.double()
        model.load_state_dict(tensors)
    except (RuntimeError, OverflowError, KeyError, safetensors.SafetensorError) as error:
        # In one line, and as text: it holds names of tensors, which a terminal may take for commands.
        why = ascii(" ".join(str(error).split())[:MAX_REASON])[1:-1]
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {why}") from None
    return model.eval(), scores, found


def load_checkpoint(folder: str | Path) -> tuple[AutoregressiveModel, dict[str, Any]]:
    """Read the model, in eval mode on the CPU, and the scores that `save_checkpoint` wrote, even if it was cut off.

    `folder` may also be the name of released weights; a folder comes first.

    Raises:
        ValueError: a file is missing, damaged, of another architecture, or not the one that was saved.
    """
    model, scores, _ = load_with_hash(folder)
    return model, scores


def _read_files(folder: Path) -> tuple[Path, list[bytes]]:
    """Return the place and the contents of config, scores and weights, all three of the same checkpoint."""
    for _ in range(MAX_READS):
        found = _current(folder)
        missing: OSError | None = None
        try:
            contents = [(found[0] / name).read_bytes() for name in (CONFIG_FILE, SCORES_FILE, WEIGHTS_FILE)]
        except OSError as error:
            missing = error
        if _current(folder) != found:
            continue  # it was replaced meanwhile: the files may be of two checkpoints
        if isinstance(missing, FileNotFoundError):
            raise ValueError(
                f"{folder} is no checkpoint: {Path(missing.filename).name} is missing. Name a folder that holds one, "
                f"or released weights: {', '.join(released()) or 'none came with this code'}."
            )
        if missing is not None:
            raise ValueError(f"{folder} is no checkpoint that can be read: {missing.strerror}.")
        return found[0], contents
    raise ValueError(f"{folder} is replaced faster than it can be read. Try again.")
