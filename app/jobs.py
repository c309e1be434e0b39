"""What the service computes: a checked request becomes a job, and jobs that wait together may share a call."""

import itertools
import math
import secrets
from typing import Any

import torch
from torch import Tensor

from app.batching import Job
from app.champions import Champion
from app.wire import (
    MAX_SEED,
    CompleteAnswer,
    CompleteRequest,
    GenerateAnswer,
    GenerateRequest,
    LikelihoodAnswer,
    LikelihoodRequest,
    read_image,
    read_label,
    read_observed,
    to_lists,
)
from pixelcnn import bits_per_dim
from pixelcnn.completion import complete_and_score
from pixelcnn.fast_sampling import OnRow, engine_name
from pixelcnn.likelihood import pixel_log_prob
from pixelcnn.sampling import generator_for

SHORT_CALL = 1e10  # sub-pixels times parameters: less than a tenth of a second on two cores


def noise(seed: int, num_images: int, image_shape: tuple[int, int, int]) -> Tensor:
    """Return (B, C, H, W) uniform noise; image i depends on (seed, i) alone, not on how many were asked for."""
    return torch.stack(
        [torch.rand(image_shape, generator=generator_for(seed, i), dtype=torch.float64) for i in range(num_images)]
    )


class _NobodyWaits(Exception):
    """Everybody who asked for these images has left."""


class SamplingJob(Job):
    """A checked request for completions, or for whole images: those of which nothing is observed.

    Args:
        on_row: is told each finished row and its levels, (num_samples, C, W), from the thread that samples.

    Raises:
        RequestError: the request does not fit the champion.
    """

    def __init__(self, champion: Champion, request: GenerateRequest, on_row: OnRow | None = None) -> None:
        config, num = champion.config, request.num_samples
        self.champion, self.on_row = champion, on_row
        self.levels: Tensor | None = None
        self.is_completion = isinstance(request, CompleteRequest)
        self.observed = torch.zeros(1, 1, *config.image_shape[1:], dtype=torch.bool)
        self.image = torch.zeros(1, *config.image_shape, dtype=torch.int64)
        if isinstance(request, CompleteRequest):
            self.observed = read_observed(request.observed, config)
            self.image = read_image(request.image, config, self.observed)
        self.observed, self.image = self.observed.repeat(num, 1, 1, 1), self.image.repeat(num, 1, 1, 1)
        self.label = read_label(request.label, config, num)
        self.seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        self.temperature = request.temperature
        # The compiled sampler computes each image by itself: not a bit of it depends on what is beside it. The others
        # do not promise that, so with them nobody shares.
        shares = engine_name(champion.model) == "cached, compiled"
        # Drawings may have a network of their own: a call is for one network.
        key = (id(champion), request.temperature, bool(self.observed.any()))
        super().__init__(request.dataset, key if shares else object(), num)

    @staticmethod
    def run_together(jobs: list["SamplingJob"]) -> None:
        champion, temperature = jobs[0].champion, jobs[0].temperature
        config = champion.config
        ends = list(itertools.accumulate(job.num_images for job in jobs))
        parts = [slice(end - job.num_images, end) for job, end in zip(jobs, ends, strict=True)]

        def on_row(row: int, levels: Tensor) -> None:
            if all(job.done.cancelled() for job in jobs):
                raise _NobodyWaits
            for job, part in zip(jobs, parts, strict=True):
                if job.on_row is not None:
                    job.on_row(row, levels[part])

        image, observed = (torch.cat([getattr(job, name) for job in jobs]) for name in ("image", "observed"))
        u = torch.cat([noise(job.seed, job.num_images, config.image_shape) for job in jobs])
        label = None
        if config.num_labels:
            none = [torch.full((job.num_images,), -1) for job in jobs]
            label = torch.cat([n if job.label is None else job.label for job, n in zip(jobs, none, strict=True)])
        # Between rows the threads of the sampler wait for each other, which a short call would feel: it is
        # told of rows only where somebody listens, or where it pays to notice that nobody waits any more.
        listens = any(job.on_row is not None for job in jobs) or u.numel() * champion.num_parameters > SHORT_CALL
        try:
            levels, log_probs = complete_and_score(
                champion.model, image, observed, u, label, temperature, on_row if listens else None
            )
        except _NobodyWaits:
            return
        for job, part in zip(jobs, parts, strict=True):
            if not job.done.cancelled():
                job.levels = levels[part]
                job.finish(job.answer(levels[part], log_probs[part]))

    def answer(self, levels: Tensor, log_probs: Tensor) -> "CompleteAnswer | GenerateAnswer":
        common: dict[str, Any] = {"log_probs": log_probs.tolist(), "seed": self.seed, "model": self.champion.identity}
        if self.is_completion:
            return CompleteAnswer(completions=to_lists(levels), **common)
        return GenerateAnswer(images=to_lists(levels), **common)


class LikelihoodJob(Job):
    """A checked image to be scored. Scores share no call: torch promises no equal bits in a larger batch.

    Raises:
        RequestError: the request does not fit the champion.
    """

    def __init__(self, champion: Champion, request: LikelihoodRequest) -> None:
        self.champion = champion
        self.levels = read_image(request.image, champion.config)
        self.label = read_label(request.label, champion.config)
        super().__init__("likelihood", object(), 1)

    @staticmethod
    def run_together(jobs: list["LikelihoodJob"]) -> None:
        for job in jobs:
            with torch.inference_mode():
                nats = -pixel_log_prob(job.champion.model, job.levels, job.label)[0].double()  # (C, H, W)
            total = nats.sum().item()
            answer = LikelihoodAnswer(
                log_prob=-total,
                bits_per_dim=bits_per_dim(total, job.champion.config.image_shape),
                surprise=nats.sum(dim=0).tolist(),
                model=job.champion.identity,
            )
            job.finish(answer)


class WatchJob(Job):
    """Score what was known of a completed image, for the metrics alone: nothing of it is kept."""

    def __init__(self, asked: SamplingJob, completion: Tensor) -> None:
        self.asked, self.levels = asked, completion[:1]
        super().__init__("watch", object(), 1)

    @staticmethod
    def run_together(jobs: list["WatchJob"]) -> None:
        for job in jobs:
            champion, observed = job.asked.champion, job.asked.observed[:1]
            label = None if job.asked.label is None else job.asked.label[:1]
            with torch.inference_mode():
                nats = -(pixel_log_prob(champion.model, job.levels, label) * observed).sum().item()
            num_dims = int(observed.sum()) * champion.config.image_shape[0]
            job.finish(nats / (num_dims * math.log(2)))
