"""Training: one loop, callbacks, no tracker.

Everything random in step s depends on (seed, s) alone, so a run that was stopped and resumed sees the same batches,
the same Bernoulli samples, the same dropped labels and the same masks as one that was not.

A model with a context network is trained to complete: of a share of the images it is shown a part (observed.py), and
its loss is the negative log-likelihood of the rest given that part. For the other images it is that of the whole image,
so the same weights stay the joint model.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from pixelcnn.config import config_to_dict
from pixelcnn.data import Dataset
from pixelcnn.evaluation import check_fit, format_nll, per_image_nll
from pixelcnn.likelihood import pixel_log_prob
from pixelcnn.model import AutoregressiveModel, build_model
from pixelcnn.observed import training_masks
from pixelcnn.optimisers import OPTIMISERS, Optimiser
from pixelcnn.sampling import generator_for

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16")
BFLOAT16_CPUS = ("avx512_bf16", "amx_bf16")  # instructions without which bfloat16 is nine times slower than float32
# What may shift when a run goes on with a larger budget, some of it with a meaning for a context network alone.
CONTEXT_SETTINGS = ("context_features", "context_width", "context_share")
PHASE_SETTINGS = (
    "batch_size",
    "label_dropout",
    "precision",
    "optimiser",
    "learning_rate",
    "ema_decay",
    *CONTEXT_SETTINGS,
)
CONTEXT_NETWORK = ("context_features", "context_width")  # each is 0 if it is not named
TRAIN_SUBSET = 500  # training images scored beside the validation split: overfitting is the gap between the two


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Args:
        batch_size: images per optimiser step.
        learning_rate: its peak.
        optimiser: `adam`, or `muon` for the convolutions' kernels and Adam for the rest (optimisers.py).
        max_epochs: passes over the training split; the schedule ends here, or at `max_minutes`.
        max_minutes: minutes of training; 0 for no limit. The schedule is fitted to whichever ends first.
        warmup_steps: steps of linear warm-up.
        decay_fraction: last part of the run in which the learning rate falls linearly to zero.
        ema_decay: decay per step of the averaged weights, those that are scored and kept; 0 for no average.
        clip_norm: largest norm of the gradient of the loss in nats per sub-pixel.
        label_dropout: share of the images whose label is withheld, so that one network serves with and without.
        context_share: share of the images that are shown in part, for models with a context network.
        horizontal_flips: mirror half of the images (fair for CIFAR-10, not for digits or clothes).
        precision: `float32`, or `bfloat16` for autocast of the matrix work; `auto` for the one that is faster here.
        accumulate: parts that a batch is split into, to save memory.
        num_validations: how often the validation split is scored, evenly over the run.
        num_validation_images: how many of its images are scored then; 0 for all.
        save_minutes: minutes between saves of the state file.
        seed: of the batches and everything else that is drawn.

    Raises:
        ValueError: a value is impossible.
    """

    batch_size: int
    learning_rate: float
    max_epochs: float
    optimiser: str = "adam"
    max_minutes: float = 0
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    label_dropout: float = 0.5
    context_share: float = 0.75
    horizontal_flips: bool = False
    precision: str = "float32"
    accumulate: int = 1
    num_validations: int = 10
    num_validation_images: int = 0
    save_minutes: float = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "num_validations"):
            _check(name, getattr(self, name), int, 1, 1_000_000)
        for name in ("warmup_steps", "num_validation_images", "seed"):
            _check(name, getattr(self, name), int, 0, 2**63 - 1)
        for name in ("learning_rate", "max_epochs", "clip_norm"):
            _check(name, getattr(self, name), float, 0, {"learning_rate": 1.0}.get(name, 1e9), above=True)
        for name in ("max_minutes", "save_minutes"):
            _check(name, getattr(self, name), float, 0, 1e9)
        for name in ("decay_fraction", "ema_decay", "label_dropout", "context_share"):
            _check(name, getattr(self, name), float, 0, 1)
        for name, choices in (("precision", (*PRECISIONS, "auto")), ("optimiser", OPTIMISERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if not isinstance(self.horizontal_flips, bool):
            raise ValueError(f"horizontal_flips must be true or false, got {self.horizontal_flips!r}.")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate must be at most batch_size ({self.batch_size}), got {self.accumulate}.")


def _check(name: str, value: Any, kind: type, least: float, most: float, above: bool = False) -> None:
    kinds = (int,) if kind is int else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not (least <= value <= most):
        word = "whole number" if kind is int else "number"
        raise ValueError(f"{name} must be a {word} from {least} to {most}, got {value!r}.")
    if above and value == least:
        raise ValueError(f"{name} must be above {least}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What `fit` tells its callback after each step.

    Args:
        step: steps done.
        epoch: passes over the training split done.
        train_nll_nats: mean loss of this step's batch, nats per image; of its missing part for images shown in part.
        learning_rate: of this step.
        images_per_s: since the start or the resume.
        remaining_s: estimate of the seconds left.
        validation_nll_nats: of the averaged weights, where it was scored after this step; of whole images, without
            a drawing.
        train_subset_nll_nats: of the same weights then, on the first `TRAIN_SUBSET` training images, without labels.
        validation_completion_nats: likewise, the mean over masks as in training of what is missing given the rest;
            None for models without a context network.
    """

    step: int
    epoch: float
    train_nll_nats: float
    learning_rate: float
    images_per_s: float
    remaining_s: float
    validation_nll_nats: float | None
    train_subset_nll_nats: float | None = None
    validation_completion_nats: float | None = None


def resolved_precision(precision: str, device: torch.device) -> str:
    """Return what `auto` stands for on a device; any other precision as it is."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older versions of torch cannot tell.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = any(capabilities.get(name, False) for name in BFLOAT16_CPUS)
    return "bfloat16" if fast else "float32"


def format_progress(report: StepReport, data: Dataset) -> str:
    """Return one line for a person: how far, how good, how fast, how long still."""
    minutes, seconds = divmod(round(report.remaining_s), 60)
    loss = format_nll(report.train_nll_nats, data.image_shape, data.num_levels)
    line = f"step {report.step}, epoch {report.epoch:.2f}: train {loss}"
    if report.validation_nll_nats is not None:
        line += f", validation {format_nll(report.validation_nll_nats, data.image_shape, data.num_levels)}"
    if report.validation_completion_nats is not None:
        line += f" (completion {report.validation_completion_nats:.2f} nats)"
    return f"{line}, {report.images_per_s:.0f} images/s, {minutes}:{seconds:02d} left"


class Trainer:
    """The state of one run: weights, their average, the optimiser, the clock.

    Started by torchrun, each process takes its share of every batch and adds up the gradients with the others: all
    hold the same weights at each step. Process 0 alone has the clock, validates and saves.
    """

    def __init__(self, model: AutoregressiveModel, data: Dataset, config: TrainConfig) -> None:
        self.model, self.data, self.config = model, data, config
        self.parameters: list[Tensor] = list(model.parameters())
        self.device = self.parameters[0].device
        self.precision = resolved_precision(config.precision, self.device)
        self.average = [p.detach().clone() for p in self.parameters]
        self.best = [p.detach().clone() for p in self.parameters]
        self.best_nll = math.inf
        self.optimiser = Optimiser(model, config.optimiser, config.learning_rate)
        self.step = 0
        self.elapsed_s = 0.0
        self.num_validations = 0
        self.phases = [{"from_step": 0, **self.phase()}]
        self.rank, self.num_processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if config.batch_size < self.num_processes * config.accumulate:
            raise ValueError(
                f"batch_size must be at least accumulate times the {self.num_processes} processes, "
                f"got {config.batch_size} for {config.accumulate} times {self.num_processes}."
            )
        num_train = len(data.images["train"])
        if config.batch_size > num_train:
            raise ValueError(
                f"batch_size must be at most the {num_train} training images of {data.name}, got {config.batch_size}."
            )
        self.steps_per_epoch = num_train // config.batch_size
        self.max_steps = max(1, round(config.max_epochs * self.steps_per_epoch))

    def progress(self) -> float:
        """Return the part of the run that is done, in [0, 1]."""
        progress = self.step / self.max_steps
        if self.config.max_minutes:
            progress = max(progress, self.elapsed_s / (60 * self.config.max_minutes))
        return min(progress, 1.0)

    def learning_rate(self) -> float:
        config = self.config
        warm_up = min(1.0, (self.step + 1) / (config.warmup_steps + 1))
        decay = min(1.0, (1 - self.progress()) / config.decay_fraction) if config.decay_fraction else 1.0
        return config.learning_rate * warm_up * decay

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """Return the levels and labels of the step to come."""
        config = self.config
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if getattr(self, "_order_epoch", None) != epoch:
            num_train = len(self.data.images["train"])
            self._order = torch.randperm(num_train, generator=generator_for(config.seed, 0, epoch))
            self._order_epoch = epoch
        index = self._order[position * config.batch_size : (position + 1) * config.batch_size]
        generator = generator_for(config.seed, 1, self.step)
        levels = self.data.levels("train", index, generator)
        if config.horizontal_flips:
            flip = torch.rand(len(levels), generator=generator) < 0.5
            levels = torch.where(flip[:, None, None, None], levels.flip(-1), levels)
        if not self.model.config.num_labels:
            return levels.to(self.device), None
        keep = torch.rand(len(levels), generator=generator) >= config.label_dropout
        label = torch.where(keep, self.data.labels["train"][index], -1)
        return levels.to(self.device), label.to(self.device)

    def masks(self, levels: Tensor, *path: int, share: float) -> Tensor | None:
        """Return what is observed of these images, depending on them and on (seed, path); None without a context."""
        if not self.model.config.context_features:
            return None
        rng = np.random.default_rng([self.config.seed, *path])
        return training_masks(rng, levels, self.data.num_levels, share)

    def train_step(self) -> tuple[float, float]:
        """Take one step; return the loss in nats per image, and the learning rate."""
        config = self.config
        levels, label = self.batch()
        observed = self.masks(levels, 2, self.step, share=config.context_share)
        num_dims = math.prod(self.data.image_shape)
        nats = 0.0
        self.model.zero_grad(set_to_none=True)
        share = torch.arange(len(levels)).tensor_split(self.num_processes)[self.rank]
        for part in share.tensor_split(config.accumulate):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                drawing = () if observed is None else (levels[part], observed[part])
                nlls = -pixel_log_prob(self.model, levels[part], None if label is None else label[part], *drawing)
            if observed is not None:
                nlls = nlls * ~observed[part]
            # Divided by all sub-pixels, the observed ones too: an image counts by the nats that are to be explained.
            loss = nlls.sum() / (len(levels) * num_dims)
            loss.backward()
            nats += loss.item() * num_dims
        if self.num_processes > 1:
            nats = self.add_up(nats)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
        if not (math.isfinite(nats) and bool(torch.isfinite(norm))):
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {self.step + 1} (loss {nats} nats): "
                "lower learning_rate. The last saved state is untouched."
            )
        rate = self.learning_rate()
        self.optimiser.step(rate)
        self.step += 1
        # The average forgets the random start: its decay warms up, as in Polyak averaging of the first steps.
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step)) if config.ema_decay else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        return nats, rate

    def add_up(self, nats: float) -> float:
        """Add up the gradients of all processes, in place, and their shares of the loss."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor([nats])])
        dist.all_reduce(flat)
        *parts, total = flat.split([g.numel() for g in gradients] + [1])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return total.item()

    def agree(self, *values: float) -> list[float]:
        """Return the values of process 0 in all of them."""
        if self.num_processes == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.tolist()

    def use(self, weights: list[Tensor]) -> list[Tensor]:
        """Put weights into the model; return those that were there."""
        before = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
        return before

    def validate(self, on_validation: Callable[[int], None] | None) -> tuple[float, float, float | None]:
        """Score the averaged weights on validation and some training images; keep them if they are the best so far.

        The best are those of the lowest loss, the images with and without a mask in the proportion of the training.

        Returns:
            The nats of whole validation images; of whole training images; and of the missing part of masked validation
            images, for models with a context network.
        """
        before = self.use(self.average)
        num_images = self.config.num_validation_images or None
        nll = per_image_nll(self.model, self.data, "validation", num_images=num_images).mean().item()
        num_train = min(TRAIN_SUBSET, num_images or TRAIN_SUBSET)
        train_nll = per_image_nll(self.model, self.data, "train", num_images=num_train).mean().item()
        completion = None
        score = nll
        if self.model.config.context_features:
            completion = self.completion_nll(num_images)
            score = nll + self.config.context_share * (completion - nll)
        if on_validation is not None and math.isfinite(score):
            on_validation(self.step)
        self.use(before)
        if not math.isfinite(score):
            raise FloatingPointError(
                f"the validation loss is not finite at step {self.step} ({score} nats): lower learning_rate. "
                "The last saved state is untouched."
            )
        if score < self.best_nll:
            self.best_nll = score
            self.best = [w.clone() for w in self.average]
        return nll, train_nll, completion

    @torch.inference_mode()
    def completion_nll(self, num_images: int | None) -> float:
        """Return the mean nats of the missing part of validation images, one fixed mask each."""
        total, num = 0.0, 0
        for i, (levels, _) in enumerate(self.data.batches("validation", 250, num_images)):
            observed = self.masks(levels, 3, i, share=1.0)
            assert observed is not None
            levels, observed = levels.to(self.device), observed.to(self.device)
            nlls = -pixel_log_prob(self.model, levels, None, levels, observed) * ~observed
            total, num = total + nlls.sum().item(), num + len(levels)
        return total / num

    def description(self) -> dict[str, Any]:
        """Return what a saved state must share with the run that resumes it: all but the budget and the phase."""
        left_out = [
            "max_epochs",
            "max_minutes",
            "num_validations",
            "save_minutes",
            "completer_features",
            *PHASE_SETTINGS,
        ]
        return {
            "model": {k: v for k, v in config_to_dict(self.model.config).items() if k not in left_out},
            "train settings": {k: v for k, v in asdict(self.config).items() if k not in left_out},
            "data hash": self.data.data_hash,
        }

    def phase(self) -> dict[str, Any]:
        """Return what a run that goes on with a larger budget may shift: the uses that the network learns for."""
        values = {**asdict(self.model.config), **asdict(self.config), "precision": self.precision}
        left_out = () if values["context_features"] else CONTEXT_SETTINGS
        return {name: values[name] for name in PHASE_SETTINGS if name not in left_out}

    def save(self, path: Path) -> None:
        tensors = {}
        best_is_average = all(torch.equal(a, b) for a, b in zip(self.best, self.average, strict=True))
        for i, parameter in enumerate(self.parameters):
            tensors[f"weights/{i}"] = parameter.detach()
            tensors[f"average/{i}"] = self.average[i]
            if not best_is_average:  # as it is after a run's last validation, mostly: that file is kept
                tensors[f"best/{i}"] = self.best[i]
            for key, value in self.optimiser.state(parameter).items():
                tensors[f"optimiser/{i}/{key}"] = value
        state = {
            "description": self.description(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "best_nll": self.best_nll if math.isfinite(self.best_nll) else None,
            "phases": self.phases,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        try:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, {"state": json.dumps(state)})
            temporary.replace(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise OSError(
                f"{path} could not be saved ({error}). Make room on its disk, then run the same command again: "
                "the state that was saved before is untouched, and the run goes on from it."
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def resume(self, path: Path) -> None:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                description, last_phase = state["description"], state["phases"][-1]
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a dict
        except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no state of a training run ({error}). Delete it to start afresh.") from None
        for key, expected in self.description().items():
            found = description.get(key)
            if isinstance(expected, dict) and isinstance(found, dict):
                found = {name: found.get(name) for name in expected}  # older states name what may shift now
            if found != expected:
                raise ValueError(f"{path} is the state of a run that differs in its {key}. Delete it to start afresh.")
        indices = list(range(len(self.parameters)))
        self.best_nll = math.inf if state["best_nll"] is None else state["best_nll"]
        if self.model.config.context_features and not last_phase.get("context_features"):
            # Its joint weights, and a context network that adds nothing yet. What is best is measured otherwise now.
            indices = self.joint_indices()
            self.best_nll = math.inf
        elif any(self.phase().get(name, 0) != last_phase.get(name, 0) for name in CONTEXT_NETWORK):
            raise ValueError(f"{path} is the state of a run with another context network. Delete it to start afresh.")
        with torch.no_grad():
            for saved, i in enumerate(indices):
                average = tensors[f"average/{saved}"]
                # A state that is kept for another day may hold the averages alone, in half precision.
                self.parameters[i].copy_(tensors.get(f"weights/{saved}", average))
                self.average[i].copy_(average)
                self.best[i].copy_(tensors.get(f"best/{saved}", average))
                prefix = f"optimiser/{saved}/"
                remembered = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if remembered:
                    self.optimiser.restore(self.parameters[i], remembered)
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.phases = state["phases"]
        if self.phase() != {name: value for name, value in last_phase.items() if name != "from_step"}:
            self.phases.append({"from_step": self.step, **self.phase()})
        self.num_validations = math.floor(self.progress() * self.config.num_validations)

    def joint_indices(self) -> list[int]:
        """Return which of the parameters the same network without a context network has, in its order."""
        joint = build_model(self.model.config.without_context())
        names = [name for name, _ in self.model.named_parameters()]
        return [names.index(name) for name, _ in joint.named_parameters()]


def training_history(state_file: str | Path) -> tuple[float, list[dict[str, Any]]]:
    """Return what is behind a state file, all the runs that it was carried over together.

    Returns:
        The minutes of training; and its phases, each with the step that it began with as `from_step`, and the settings
        that it shifted.
    """
    with safetensors.safe_open(state_file, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    return state["elapsed_s"] / 60, state["phases"]


def fit(
    model: AutoregressiveModel,
    data: Dataset,
    config: TrainConfig,
    on_step: Callable[[StepReport], None] | None = None,
    state_file: str | Path | None = None,
    on_validation: Callable[[int], None] | None = None,
) -> float:
    """Train a model in place; it ends in eval mode, with the averaged weights that validated best.

    Args:
        model: as `build_model` makes it, for images of this dataset; on the device to train on. A completer is trained
            by itself: as `model.completer`, the joint model as that of `config.without_context()`.
        data: a prepared dataset.
        config: how to train.
        on_step: called after every step.
        state_file: where the run's state is saved now and then, by way of a temporary file; a run that finds one goes
            on from it. None saves nothing.
        on_validation: called with the step whenever the model was scored, while it has the averaged weights.

    Where torch.distributed is initialised, every process of it must call this with the same arguments: each takes its
    share of every batch. The callbacks are called in process 0 alone; the others end with the same model.

    Returns:
        The best validation score, nats per image: of whole images; for a model with a context network, the mean over
        whole images and images shown in part, in the proportion `context_share`.

    Raises:
        ValueError: model and dataset do not fit, the model has a completer, the batch is larger than the split, or the
            state is of another run.
        FloatingPointError: the loss is no longer finite; the last saved state is left as it was.
        OSError: the state could not be saved; the one that was saved before is left as it was.
    """
    check_fit(model, data)
    if model.completer is not None:
        raise ValueError("a model with a completer is trained in two parts: without it, and model.completer by itself.")
    trainer = Trainer(model, data, config)
    state_path = None if state_file is None else Path(state_file)
    if state_path is not None and state_path.exists():
        trainer.resume(state_path)
        logger.info("resumed from %s at step %d", state_path, trainer.step)
    start, start_step, elapsed_before = time.monotonic(), trainer.step, trainer.elapsed_s
    last_save = start
    while trainer.progress() < 1:
        model.train()
        nats, rate = trainer.train_step()
        now = time.monotonic()
        trainer.elapsed_s = trainer.agree(elapsed_before + now - start)[0]
        progress = trainer.progress()
        validation = train_subset = completion = None
        if math.floor(progress * config.num_validations) > trainer.num_validations:
            trainer.num_validations = math.floor(progress * config.num_validations)
            if trainer.rank == 0:
                model.eval()
                validation, train_subset, completion = trainer.validate(on_validation)
        if trainer.rank != 0:
            continue
        if state_path is not None and (now - last_save > 60 * config.save_minutes or progress >= 1):
            trainer.save(state_path)
            last_save = now
        if on_step is not None:
            steps = trainer.step - start_step
            on_step(
                StepReport(
                    step=trainer.step,
                    epoch=trainer.step / trainer.steps_per_epoch,
                    train_nll_nats=nats,
                    learning_rate=rate,
                    images_per_s=steps * config.batch_size / (now - start),
                    remaining_s=(1 - progress) / progress * trainer.elapsed_s,
                    validation_nll_nats=validation,
                    train_subset_nll_nats=train_subset,
                    validation_completion_nats=completion,
                )
            )
    if trainer.num_processes > 1:
        trainer.best_nll = trainer.agree(trainer.best_nll)[0]
        for weight in trainer.best:
            dist.broadcast(weight, 0)
    trainer.use(trainer.best)
    model.eval()
    return trainer.best_nll
