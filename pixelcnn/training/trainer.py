"""Training: one loop, callbacks, no tracker.

Everything random in step s depends on (seed, s) alone, so a run that was stopped and resumed sees the same batches,
the same Bernoulli samples, the same dropped labels and the same masks as one that was not.

A model with a context network is trained to complete: of a share of the images it is shown a part (observed.py), and
its loss is the negative log-likelihood of the rest given that part. For the other images it is that of the whole image,
so the same weights stay the joint model.

Where levels are drawn at each read (protocol dynamic) the loss takes the mean over the draw of the sub-pixel that it
predicts, which does not depend on the draw of those before it: the same loss on average, with less noise.
"""

import ctypes
import hashlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pixelcnn.data import DAMAGED, Dataset, bernoulli, generator_for, load_tensors, save_tensors
from pixelcnn.evaluation import check_fit, format_nll, per_image_nll
from pixelcnn.likelihood import expected_log_prob, pixel_log_prob
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.layers import LabelNetwork, Pointwise
from pixelcnn.models.registry import build_model, config_to_dict
from pixelcnn.observed import training_masks
from pixelcnn.training.config import TrainConfig, check_compiler, resolved_precision
from pixelcnn.training.optimizers import Optimizer
from pixelcnn.training.redrawn import redrawn

logger = logging.getLogger(__name__)

# Settings that may change when a run goes on, and are kept with the step from which they count.
PHASE_SETTINGS: tuple[str, ...] = ("batch_size", "label_dropout", "context_share", "halves_share", "redrawn_share")
PHASE_SETTINGS += ("precision", "compiled", "optimizer", "learning_rate", "decay_fraction", "ema_decay")
# What may change without a trace.
BUDGET_SETTINGS: tuple[str, ...] = ("max_epochs", "max_minutes", "num_validations", "save_minutes", "accumulate")
# Of networks that are trained by themselves.
BUDGET_SETTINGS += ("completer_features", "added_features", "added_context_width", "label_features")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
PROGRESS_S = 5.0  # between lines for a person
TRAIN_SUBSET = 500  # training images scored beside the validation split: overfitting is the gap between the two


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What `fit` tells its callback after each step; nats are per image."""

    step: int  # steps done
    epoch: float  # passes over the training split done
    train_nll_nats: float  # mean loss of this step's batch; of the missing part for images shown in part
    learning_rate: float  # of this step
    images_per_s: float  # since the start or the resume
    remaining_s: float  # estimate of the seconds left
    # Of the averaged weights, where they were scored after this step: on whole validation images, on the first
    # `TRAIN_SUBSET` training images without labels, and, for models with a context network, on what is missing of
    # validation images given the rest, as a mean over masks as in training.
    validation_nll_nats: float | None = None
    train_subset_nll_nats: float | None = None
    validation_completion_nats: float | None = None


OnStep = Callable[[StepReport], None]


def format_progress(report: StepReport, data: Dataset, of_labels: bool = False) -> str:
    """Return one line for a person: how far, how good, how fast, how long still; `of_labels`: of a label network."""
    minutes, seconds = divmod(round(report.remaining_s), 60)
    # A label has no dimensions: nats, as for binary images. Nobody is to take them for an image's.
    num_levels, of = (2, "of labels ") if of_labels else (data.num_levels, "")
    loss = format_nll(report.train_nll_nats, data.image_shape, num_levels)
    line = f"step {report.step}, epoch {report.epoch:.2f}: train {of}{loss}"
    if report.validation_nll_nats is not None:
        line += f", validation {of}{format_nll(report.validation_nll_nats, data.image_shape, num_levels)}"
    if report.validation_completion_nats is not None:
        line += f" (completion {report.validation_completion_nats:.2f} nats)"
    return f"{line}, {report.images_per_s:.0f} images/s, {minutes}:{seconds:02d} left"


def tell_progress(tell: Callable[[str], object], data: Dataset, of_labels: bool = False) -> OnStep:
    """Return an `on_step` for `fit` that tells a person how far it is: every few seconds, and of each validation."""
    last = -math.inf

    def on_step(report: StepReport) -> None:
        nonlocal last
        if report.validation_nll_nats is not None or time.monotonic() - last > PROGRESS_S:
            tell(format_progress(report, data, of_labels))
            last = time.monotonic()

    return on_step


@dataclass(kw_only=True)
class RunState:
    """What a run needs to go on, beside its tensors: the metadata of its state file."""

    description: dict[str, Any]  # what the run that resumes it must share with it
    step: int  # optimizer steps done
    elapsed_s: float  # seconds of training, all resumed runs together
    best_nll: float | None  # lowest validation score so far, nats per image; None before the first
    phases: list[dict[str, Any]]  # settings that may change when a run goes on, each with its first step: `from_step`
    objective: str = ""  # what `best_nll` measures; scores of different objectives do not compare


def read_state(path: Path) -> tuple[RunState, dict[str, Tensor]]:
    """Read a state file, and its tensors by name; ValueError if it is damaged, or no state of a run."""
    try:
        values, tensors = load_tensors(path, "state")
        return RunState(**values), tensors
    except DAMAGED as error:
        raise ValueError(f"{path} is no state of a training run ({error}). Delete it to start afresh.") from None


class ContextPredictor(nn.Module):
    """Predicts each missing sub-pixel by itself, whatever the others are, from the map of a context network.

    It is that of a completer, and learns in place; ValueError if there is none. A step costs a fifth of one of the
    completer, which then begins with a map that tells something of the drawing.

    Source: masked prediction, as of words in BERT, arXiv:1810.04805.
    """

    def __init__(self, completer: AutoregressiveModel) -> None:
        super().__init__()
        if completer.context_network is None:
            raise ValueError("a context network is needed: set context_features.")
        self.config, self.context = completer.config, completer.context_network
        self.last = Pointwise(self.config.context_features, self.config.image_shape[0] * self.config.num_levels)

    def forward(self, drawing: Tensor, observed: Tensor) -> Tensor:
        """Return (B, K, C, H, W) logits from a drawing and its mask, as `ContextNetwork` takes them."""
        logits: Tensor = self.last(self.context(drawing, observed)).unflatten(1, (self.config.num_levels, -1))
        return logits


Network = AutoregressiveModel | ContextPredictor | LabelNetwork  # what a run trains


class Trainer:
    """One run: the weights, their exponential moving average (EMA), the optimizer, the clock.

    Started by torchrun, each process takes its share of every batch and gradients are summed over all: the processes
    hold the same weights at each step. Rank 0 alone has the clock, validates and saves. The model is trained in place.
    ValueError if it cannot learn so (`TrainConfig.check_for`), or the batch is too large or too small.
    """

    def __init__(self, model: Network, data: Dataset, config: TrainConfig) -> None:
        self.model: Any = model  # of a kind that `nlls` and `mean_nll` know
        self.learner: Any = getattr(model, "added", None) or model  # what of it learns
        self.data, self.config = data, config
        self.parameters: list[Any] = list(self.learner.parameters())
        self.device = self.parameters[0].device
        self.precision = resolved_precision(config.precision, self.device)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.best = [p.detach().clone() for p in self.parameters]
        self.best_nll = math.inf
        context_network = getattr(self.learner, "context_network", None)  # label networks have none
        config.check_for(data.protocol, sees_drawings=context_network is not None)
        if config.compiled:
            check_compiler()
        shares: dict[Tensor, float] = {}
        if config.joint_share < 1:
            joint = dict(build_model(self.learner.config.without_context()).named_parameters())
            shares = {w: config.joint_share for name, w in self.learner.named_parameters() if name in joint}
        if context_network is not None and config.context_network_share < 1:
            shares |= dict.fromkeys(context_network.parameters(), config.context_network_share)
        model.requires_grad_(False)
        for weight in self.parameters:
            weight.requires_grad_(shares.get(weight, 1.0) > 0)
        self.optimizer = Optimizer(self.learner, config.optimizer, shares)
        self.step = 0
        self.extra_steps = 0.0  # epochs of earlier batch sizes, as steps of this one, less the steps that they took
        self.elapsed_s = 0.0
        self.phases = [{"from_step": 0, **self.phase()}]
        self.rank, self.num_processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        num_train, least = len(data.images["train"]), self.num_processes * config.accumulate
        if not least <= config.batch_size <= num_train:
            raise ValueError(
                f"batch_size must be from {least} (accumulate times processes) to the {num_train} training images of "
                f"{data.name}, got {config.batch_size}."
            )
        self.steps_per_epoch = num_train // config.batch_size
        self.max_steps = max(1, round(config.max_epochs * self.steps_per_epoch))
        self.completes_given_labels = bool(model.config.num_labels) and config.label_dropout < 0.5
        self.nlls_to_lower = torch.compile(self.nlls) if config.compiled else self.nlls
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def progress(self) -> float:
        """Return the part of the run that is done, in [0, 1]."""
        progress = (self.step + self.extra_steps) / self.max_steps
        if self.config.max_minutes:
            progress = max(progress, self.elapsed_s / (60 * self.config.max_minutes))
        return 1.0 if progress > 1 - 1e-9 else progress  # epochs of several batch sizes are rounded

    def learning_rate(self) -> float:
        """Return the learning rate of the step to come: linear warm-up, constant, linear decay to zero."""
        config = self.config
        warm_up = min(1.0, (self.step + 1) / (config.warmup_steps + 1))
        decay = min(1.0, (1 - self.progress()) / config.decay_fraction) if config.decay_fraction else 1.0
        return config.learning_rate * warm_up * decay

    def batch(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Return the levels of the step to come, their labels, with which probabilities the levels were drawn, and
        which images were drawn anew.

        Labels are (B,) int64, -1 where withheld; None without labels. Probabilities: `Dataset.probabilities`.
        """
        config = self.config
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if self._epoch != epoch:
            num_train = len(self.data.images["train"])
            self._epoch = epoch
            self._order = torch.randperm(num_train, generator=generator_for(config.seed, 0, epoch))
        index = self._order[position * config.batch_size : (position + 1) * config.batch_size]
        generator = generator_for(config.seed, 1, self.step)
        levels, probabilities = self.data.levels("train", index, generator), self.data.probabilities("train", index)
        is_redrawn = torch.zeros(len(levels), dtype=torch.bool)
        if config.redrawn_share:
            anew = redrawn(self.data.images["train"][index], generator)
            is_redrawn = torch.rand(len(levels), generator=generator) < config.redrawn_share
            levels[is_redrawn] = anew[is_redrawn]
            if probabilities is not None:
                probabilities[is_redrawn] = bernoulli(anew[is_redrawn])
        if config.horizontal_flips:
            flip = torch.rand(len(levels), generator=generator) < 0.5
            levels[flip] = levels[flip].flip(-1)
            if probabilities is not None:
                probabilities[flip] = probabilities[flip].flip(-1)
        label = None
        if self.model.config.num_labels:
            keep = torch.rand(len(levels), generator=generator) >= config.label_dropout
            label = torch.where(keep, self.data.labels["train"][index], -1).to(self.device)
        probabilities = None if probabilities is None else probabilities.to(self.device)
        return levels.to(self.device), label, probabilities, is_redrawn

    def masks(self, levels: Tensor, *path: int, **shares: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return what `training_masks` draws, by its `shares`, for (B, C, H, W) levels; None twice without a context.

        A function of the levels and of (seed, path).
        """
        if not self.model.config.context_features:
            return None, None
        rng = np.random.default_rng([self.config.seed, *path])
        return training_masks(rng, levels, self.data.num_levels, **shares)

    def nlls(
        self, levels: Tensor, label: Tensor | None, observed: Tensor | None, probabilities: Tensor | None = None
    ) -> Tensor:
        """Return a batch's losses in nats, of any shape; their sum is minimised. `observed`: (B, 1, H, W) or None.

        Given the probabilities of the levels, as `batch` does, it is the mean over what each sub-pixel may be.
        """
        given = (label,) if observed is None else (label, levels, observed)
        if probabilities is None:
            log_probs = pixel_log_prob(self.model, levels, *given)
        else:
            log_probs = expected_log_prob(self.model, levels, probabilities, *given)
        return -log_probs if observed is None else -log_probs * ~observed

    def train_step(self) -> tuple[float, float]:
        """Take one optimizer step; return the batch's loss, nats per image, and the learning rate.

        Raise FloatingPointError, and leave the weights as they were, where the loss or its gradient is not finite.
        """
        config = self.config
        levels, label, probabilities, is_redrawn = self.batch()
        halves_share = config.halves_share * ~is_redrawn
        observed, follows_ink = self.masks(levels, 2, self.step, share=config.context_share, halves_share=halves_share)
        if probabilities is not None and follows_ink is not None:
            # Which of its pixels are missing depends on the draw: for such an image the loss is that of the draw.
            probabilities[follows_ink] = bernoulli(levels[follows_ink])
        num_dims = math.prod(self.data.image_shape)
        nats = 0.0
        self.model.zero_grad(set_to_none=True)
        share = torch.arange(len(levels)).tensor_split(self.num_processes)[self.rank]
        for part in share.tensor_split(config.accumulate):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                others = (label, observed, probabilities)
                nlls = self.nlls_to_lower(levels[part], *(None if x is None else x[part] for x in others))
            # Divided by all sub-pixels, the observed ones too: an image counts by the nats that are to be explained.
            loss = nlls.sum() / (len(levels) * num_dims)
            torch.autograd.backward(loss)
            nats += loss.item() * num_dims
        if self.num_processes > 1:
            nats = self.all_reduce_gradients(nats)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
        check_finite("loss or its gradient", self.step + 1, nats, float(norm))
        rate = self.learning_rate()
        self.optimizer.step(rate)
        self.step += 1
        # The decay warms up, so that the average soon forgets the random start.
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step)) if config.ema_decay else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        return nats, rate

    def all_reduce_gradients(self, nats: float) -> float:
        """Sum the gradients over all processes, in place; return the sum of their losses."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor([nats])])
        dist.all_reduce(flat)
        *parts, total = torch.split(flat, [g.numel() for g in gradients] + [1])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return float(total)

    def broadcast(self, value: float) -> float:
        """Broadcast rank 0's value to all ranks."""
        if self.num_processes == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def set_weights(self, weights: list[Tensor]) -> None:
        """Copy weights, in the order of `parameters`, into the model."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, weights)

    def objective(self) -> str:
        """Say what the validation score measures: scores of different objectives do not compare."""
        share = self.config.context_share if self.model.config.context_features else 0.0
        given = " given the label" if share and self.completes_given_labels else ""
        return f"validation nats per image, of {share:g} of the images those of the missing part{given}"

    def validate(self, on_validation: Callable[[int], None] | None) -> dict[str, Any]:
        """Score the averaged weights on validation and some training images; keep them if they are the best so far.

        The best are those of the lowest loss, the images with and without a mask in the proportion of the training.
        Return what a `StepReport` says of it, by field; raise FloatingPointError where the score is not finite.
        """
        num_images = self.config.num_validation_images or None
        trained = [p.detach().clone() for p in self.parameters]
        self.set_weights(self.ema)
        try:
            nll = self.mean_nll("validation", num_images)
            train_nll = self.mean_nll("train", min(TRAIN_SUBSET, num_images or TRAIN_SUBSET))
            completion = self.completion_nll(num_images)
            score = nll if completion is None else nll + self.config.context_share * (completion - nll)
            if on_validation is not None and math.isfinite(score):
                on_validation(self.step)
        finally:
            self.set_weights(trained)
        check_finite("validation loss", self.step, score)
        if score < self.best_nll:
            self.best_nll = score
            self.best = [w.clone() for w in self.ema]
        report = {"validation_nll_nats": nll, "train_subset_nll_nats": train_nll}
        return {**report, "validation_completion_nats": completion}

    def mean_nll(self, split: str, num_images: int | None) -> float:
        """Return the mean nats of the first images of a split, whole and without label."""
        return per_image_nll(self.model, self.data, split, num_images=num_images).mean().item()

    def completion_nll(self, num_images: int | None) -> float | None:
        """Return the mean nats of what is missing of validation images, one fixed mask each; None without a context."""
        if not self.model.config.context_features:
            return None
        # Labels are given if the training withholds few of them: then a label network will say which.
        return self.masked_nll("validation", num_images, self.completes_given_labels)

    @torch.inference_mode()
    def masked_nll(self, split: str, num_images: int | None, with_labels: bool) -> float:
        """Return the mean of `nlls` over a split's first images, of each of which one fixed mask is known."""
        total, num = 0.0, 0
        for i, (levels, labels) in enumerate(self.data.batches(split, 250, num_images)):
            levels = levels.to(self.device)
            observed, _ = self.masks(levels, 3, i, share=1.0)
            nlls = self.nlls(levels, labels.to(self.device) if with_labels else None, observed)
            total, num = total + nlls.sum().item(), num + len(levels)
        return total / num

    def description(self) -> dict[str, Any]:
        """Return what a saved state must share with the run that resumes it: all but the budget and the phase."""
        left_out = (*BUDGET_SETTINGS, *PHASE_SETTINGS)
        return {
            "model": {k: v for k, v in config_to_dict(self.learner.config).items() if k not in left_out},
            "train settings": {k: v for k, v in asdict(self.config).items() if k not in left_out},
            "data hash": self.data_hash,
        }

    @cached_property
    def data_hash(self) -> str:
        """Return the dataset's hash; of one made in memory, which has none, that of what a run reads of it."""
        if self.data.data_hash:
            return self.data.data_hash
        found = hashlib.md5()
        for split in ("train", "validation"):
            for values in (self.data.images[split], self.data.labels[split]):
                found.update(values.cpu().numpy().tobytes())
        return found.hexdigest()

    def phase(self) -> dict[str, Any]:
        """Return the settings that may change when a run goes on."""
        values = {**asdict(self.config), "precision": self.precision}
        if not self.model.config.context_features:
            del values["context_share"], values["halves_share"]
        return {name: values[name] for name in PHASE_SETTINGS if name in values}

    def save(self, path: Path) -> None:
        """Write the run's state (`RunState`): weights, EMA, best, optimizer, step and clock."""
        kept = {"weights": self.parameters, "ema": self.ema, "best": self.best}
        if all(torch.equal(a, b) for a, b in zip(self.best, self.ema, strict=True)):
            del kept["best"]  # as mostly after a run's last validation, in the file that is kept
        tensors = {f"{name}/{i}": w.detach() for name, weights in kept.items() for i, w in enumerate(weights)}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"optimizer/{i}/{key}": value for key, value in self.optimizer.state(parameter).items()}
        state = RunState(
            description=self.description(),
            step=self.step,
            elapsed_s=self.elapsed_s,
            best_nll=self.best_nll if math.isfinite(self.best_nll) else None,  # JSON has no infinity
            phases=self.phases,
            objective=self.objective(),
        )
        save_tensors(path, tensors, state=asdict(state))

    def resume(self, path: Path) -> None:
        """Go on from a saved state; ValueError if its run differs in more than the budget and the settings of a phase.

        If the two runs validate by different objectives, the best score so far is dropped.
        """
        state, tensors = read_state(path)
        defaults = {f.name: f.default for c in (type(self.model.config), TrainConfig) for f in fields(c)}
        for key, expected in self.description().items():
            found = state.description.get(key, {})
            if isinstance(expected, dict):
                # An older state may lack a setting that is newer than it, or have it among those of its phases.
                settings = {**defaults, **found, **state.phases[-1]}
                found = {name: settings.get(name) for name in expected}
                if changed := [name for name, value in expected.items() if found[name] != value]:
                    key = f"{key} ({', '.join(changed)})"
            # An older state says nothing of data that were made in memory.
            if found != expected and not found == self.data.data_hash == "":
                raise ValueError(
                    f"{path} is the state of a run that differs in its {key}. Set it back to go on, or delete the file "
                    "to start afresh."
                )
        shapes = {f"weights/{i}": parameter.shape for i, parameter in enumerate(self.parameters)}
        if {key: tensor.shape for key, tensor in tensors.items() if key.startswith("weights/")} != shapes:
            raise ValueError(f"{path} is the state of a network of other weights. Delete it to start afresh.")
        if state.best_nll is not None and state.objective == self.objective():
            self.best_nll = state.best_nll
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                ema = tensors[f"ema/{i}"]
                parameter.copy_(tensors[f"weights/{i}"])
                self.ema[i].copy_(ema)
                self.best[i].copy_(tensors.get(f"best/{i}", ema))
                prefix = f"optimizer/{i}/"
                optimizer_state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                self.optimizer.restore(parameter, optimizer_state)
        self.step, self.elapsed_s, self.phases = state.step, state.elapsed_s, state.phases
        # What came to the phases later stands in the description of an older state.
        before = {**defaults, **state.description["train settings"], **self.phases[-1]}
        if any(before[name] != value for name, value in self.phase().items()):
            self.phases.append({"from_step": self.step, **self.phase()})
        known = {**asdict(self.config), **state.description["train settings"]}
        for phase, following in pairwise(self.phases):
            its_steps_per_epoch = len(self.data.images["train"]) // {**known, **phase}["batch_size"]
            steps = following["from_step"] - phase["from_step"]
            self.extra_steps += steps * (self.steps_per_epoch / its_steps_per_epoch - 1)


class DrawingTrainer(Trainer):
    """A run that trains a network that sees drawings alone, one fixed mask of each image at validation."""

    def mean_nll(self, split: str, num_images: int | None) -> float:
        return self.masked_nll(split, num_images, with_labels=True)

    def completion_nll(self, num_images: int | None) -> None:
        return None


class ContextTrainer(DrawingTrainer):
    """A run that trains a context network: to tell each missing sub-pixel by itself, whatever the others are."""

    def nlls(
        self, levels: Tensor, label: Tensor | None, observed: Tensor | None, probabilities: Tensor | None = None
    ) -> Tensor:
        """Return (B, C, H, W) nats of the sub-pixels, 0 where they are known."""
        assert observed is not None
        targets = levels if probabilities is None else probabilities
        return F.cross_entropy(self.model(levels, observed).float(), targets, reduction="none") * ~observed

    def objective(self) -> str:
        return "validation nats per image of the missing part, each sub-pixel by itself"


class LabelTrainer(DrawingTrainer):
    """A run that trains a label network: to tell the label of what is known of an image."""

    def nlls(
        self, levels: Tensor, label: Tensor | None, observed: Tensor | None, probabilities: Tensor | None = None
    ) -> Tensor:
        """Return (B,) nats of the labels, 0 where one is withheld."""
        assert label is not None
        return F.cross_entropy(self.model(levels, observed), label, ignore_index=-1, reduction="none")

    def objective(self) -> str:
        return "validation nats of the label of an image that is known in part"


TRAINERS: dict[type, type[Trainer]] = {ContextPredictor: ContextTrainer, LabelNetwork: LabelTrainer}


def check_finite(what: str, step: int, nats: float, gradient_norm: float = 0.0) -> None:
    """Raise FloatingPointError unless a step's numbers are finite."""
    if not (math.isfinite(nats) and math.isfinite(gradient_norm)):
        raise FloatingPointError(
            f"the {what} is not finite at step {step} ({nats} nats): lower learning_rate. The last saved state is "
            "untouched."
        )


@contextmanager
def memory_for_step() -> Iterator[None]:
    """Raise MemoryError where torch found no room for a step; its own error is a RuntimeError, as a bug's is."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise MemoryError(
            "a step does not fit into memory: lower batch_size, or raise accumulate, the parts that a batch is split "
            "into. The last saved state is untouched."
        ) from None


def keep_memory() -> None:
    """Let glibc keep freed memory: a step that gets its tensors from the system each time is 6 % slower."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def fit(
    model: Network,
    data: Dataset,
    config: TrainConfig,
    on_step: OnStep | None = None,
    state_file: str | Path | None = None,
    on_validation: Callable[[int], None] | None = None,
) -> float:
    """Train a model in place; it ends in eval mode, with the averaged weights that validated best.

    Where torch.distributed is initialised, every process of it must call this with the same arguments: each takes its
    share of every batch. The callbacks are called in process 0 alone; the others end with the same model.

    Args:
        model: as `build_model` makes it, on the device to train on. A completer is trained by itself, as
            `model.completer`, and so is a label network; the joint model as that of `config.of_joint()`. A context
            network may learn before its completer does, as part of a `ContextPredictor`. Of a completer with a network
            whose logits are `added` that one alone learns, in the sum.
        on_step: called after every step.
        state_file: where the run's state is saved now and then; a run that finds one goes on from it. None saves none.
        on_validation: called with the step whenever the model was scored, while it has the averaged weights.

    Returns:
        The best validation score, nats per image: of whole images; for a model with a context network, the mean over
        whole images and images shown in part, in the proportion `context_share`. A label network's are of the label.

    Raises:
        ValueError: model and dataset do not fit, the model has a completer or a label network, the batch is larger than
            the split, or the state is of another run.
        FloatingPointError: the loss is no longer finite; the last saved state is left as it was.
        MemoryError: a step does not fit into memory; likewise.
        OSError: the state could not be saved; the one that was saved before is left as it was.
    """
    check_fit(model.config, data)
    if isinstance(model, AutoregressiveModel) and (model.completer is not None or model.label_network is not None):
        raise ValueError(
            "a model with a completer or a label network is trained in parts: call fit on a model of "
            "config.of_joint(), then on model.completer and on model.label_network."
        )
    keep_memory()
    trainer = TRAINERS.get(type(model), Trainer)(model, data, config)
    state_path = None if state_file is None else Path(state_file)
    if state_path is not None and state_path.exists():
        trainer.resume(state_path)
        logger.info("resumed from %s at step %d", state_path, trainer.step)
    start_step, elapsed_before = trainer.step, trainer.elapsed_s
    progress = start_progress = trainer.progress()
    start = last_save = time.monotonic()
    while progress < 1:
        validations_before = math.floor(progress * config.num_validations)
        model.train()
        with memory_for_step():
            nats, rate = trainer.train_step()
        now = time.monotonic()
        trainer.elapsed_s = trainer.broadcast(elapsed_before + now - start)
        progress = trainer.progress()
        validated: dict[str, Any] = {}
        if trainer.rank != 0:
            continue
        if math.floor(progress * config.num_validations) > validations_before:
            model.eval()
            validated = trainer.validate(on_validation)
        if state_path is not None and (now - last_save > 60 * config.save_minutes or progress >= 1):
            trainer.save(state_path)
            last_save = now
        if on_step is not None:
            steps = trainer.step - start_step
            on_step(
                StepReport(
                    step=trainer.step,
                    epoch=(trainer.step + trainer.extra_steps) / trainer.steps_per_epoch,
                    train_nll_nats=nats,
                    learning_rate=rate,
                    images_per_s=steps * config.batch_size / (now - start),
                    remaining_s=(1 - progress) / (progress - start_progress) * (now - start),
                    **validated,
                )
            )
    model.eval()
    if math.isinf(trainer.best_nll) and trainer.rank == 0:  # a finished run, resumed with another objective
        trainer.validate(on_validation)
    if trainer.num_processes > 1:
        trainer.best_nll = trainer.broadcast(trainer.best_nll)
        for weight in trainer.best:
            dist.broadcast(weight, 0)
    trainer.set_weights(trainer.best)
    return trainer.best_nll
