"""What the service computes: a checked request becomes a job, and jobs that wait together may share a call."""

import contextlib
import functools
import itertools
import secrets
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from app.service import wire
from app.service.batching import Job
from app.service.champions import Champion
from app.service.images import read_image, read_label, read_observed, to_lists
from pixelcnn import bits_per_dim, packed_bytes
from pixelcnn.completion import complete_and_score
from pixelcnn.data import generator_for
from pixelcnn.likelihood import pixel_log_prob
from pixelcnn.sampling.fast import engine_name
from pixelcnn.sampling.naive import OnRow

REST_S = 0.1  # pause before streamed completions are scored: the next stroke's completion comes first
SHORT_CALL = 1e10  # sub-pixels times parameters: less than a tenth of a second on two cores


def noise(seed: int, num_images: int, image_shape: tuple[int, int, int]) -> Tensor:
    """Return (B, C, H, W) uniform noise; image i depends on (seed, i) alone, not on how many were asked for."""
    generators = (generator_for(seed, i) for i in range(num_images))
    return torch.stack([torch.rand(image_shape, generator=one, dtype=torch.float64) for one in generators])


class ReadingJob(Job):
    """The reading of a request whose image is a PNG: a crafted one of 60 kB would hold the event loop up for long."""

    def __init__(self, read: Callable[[], Job]) -> None:
        self.read = read  # raises RequestError if the request does not fit
        super().__init__("/pictures")

    def answer(self) -> Job:
        return self.read()


class _NobodyWaits(Exception):
    """Every job of a call is cancelled or has failed: the sampler may stop."""


def _leave_if_nobody_waits(jobs: list["SamplingJob"]) -> None:
    if all(job.done.done() for job in jobs):
        raise _NobodyWaits


class SamplingJob(Job):
    """A request for completions, or for whole images, of which nothing is observed; RequestError if it does not fit.

    Args:
        on_row: called from the sampling thread with each finished row's number and levels, (num_samples, C, W); what
            it raises fails this job.
    """

    def __init__(self, champion: Champion, request: wire.GenerateRequest, on_row: OnRow | None = None) -> None:
        config, num = champion.model.config, request.num_samples
        self.champion, self.request, self.on_row = champion, request, on_row
        if isinstance(request, wire.CompleteRequest):
            observed = read_observed(request.observed, config)
            image = read_image(request.image, config, observed)
        else:
            observed = torch.zeros(1, 1, *config.image_shape[1:], dtype=torch.bool)
            image = torch.zeros(1, *config.image_shape, dtype=torch.int64)
        self.observed, self.image = observed.repeat(num, 1, 1, 1), image.repeat(num, 1, 1, 1)
        self.label = read_label(request.label, config, num)
        self.seed = secrets.randbelow(wire.MAX_SEED + 1) if request.seed is None else request.seed
        # Once drawn: (num_samples, C, H, W), and what returns as many nats, stopped by what it calls after each row.
        self.levels: Tensor | None = None
        self.score: Callable[[OnRow], Tensor] | None = None
        # Only the compiled sampler computes each image by itself, so that no bit of it depends on its neighbours.
        # With the others no call is shared.
        shares = engine_name(champion.model) == "cached, compiled"
        # A call is for one network, and drawings may have one of their own.
        key = (id(champion), request.temperature, bool(observed.any()))
        super().__init__(request.dataset, key if shares else object(), num)

    @staticmethod
    def run_together(jobs: list["SamplingJob"]) -> None:
        if jobs[0].levels is None:
            SamplingJob._draw(jobs)
            # With a label network and no label the sampler goes through endings again to say how probable they are: of
            # each request in another call, behind all who have no images yet, and only as long as its client does not
            # draw on.
            if jobs[0].champion.model.label_network is not None and bool(jobs[0].observed.any()):
                later = [job for job in jobs if job.request.label in (None, -1)]
                for job in later:
                    if job.on_row is not None:
                        job.not_before = time.monotonic() + REST_S
                jobs = [job for job in jobs if job not in later]
        for job in jobs:
            if not job.done.done():
                with contextlib.suppress(_NobodyWaits):
                    job.finish(job.answer())

    @staticmethod
    def _draw(jobs: list["SamplingJob"]) -> None:
        champion, temperature = jobs[0].champion, jobs[0].request.temperature
        ends = list(itertools.accumulate(job.num_images for job in jobs))
        parts = [slice(end - job.num_images, end) for job, end in zip(jobs, ends, strict=True)]

        def on_row(row: int, levels: Tensor) -> None:
            _leave_if_nobody_waits(jobs)
            for job, part in zip(jobs, parts, strict=True):
                if job.on_row is not None:
                    try:
                        job.on_row(row, levels[part])
                    except Exception as error:
                        job.finish(error)

        image, observed = (torch.cat([getattr(job, name) for job in jobs]) for name in ("image", "observed"))
        u = torch.cat([noise(job.seed, job.num_images, champion.model.config.image_shape) for job in jobs])
        labels = [job.label for job in jobs if job.label is not None]  # all or none: they share the model
        label = torch.cat(labels) if labels else None
        # Rows are reported only to a listener, or where stopping early pays: it costs a short call some percent.
        listens = any(job.on_row is not None for job in jobs) or u.numel() * champion.num_parameters > SHORT_CALL
        try:
            levels, score = complete_and_score(
                champion.model, image, observed, u, label, temperature, on_row if listens else None
            )
        except _NobodyWaits:
            return
        for job, part in zip(jobs, parts, strict=True):
            job.key, job.levels, job.score = object(), levels[part], functools.partial(score, part)

    def answer(self) -> wire.CompleteAnswer | wire.GenerateAnswer:
        assert self.levels is not None
        assert self.score is not None
        images, log_probs = to_lists(self.levels), self.score(lambda *_: _leave_if_nobody_waits([self])).tolist()
        common: dict[str, Any] = {"log_probs": log_probs, "seed": self.seed, "model": self.champion.identity}
        if isinstance(self.request, wire.CompleteRequest):
            return wire.CompleteAnswer(completions=images, **common)
        return wire.GenerateAnswer(images=images, **common)


class LikelihoodJob(Job):
    """A request for a likelihood; RequestError if it does not fit the champion."""

    def __init__(self, champion: Champion, request: wire.LikelihoodRequest) -> None:
        self.champion, config = champion, champion.model.config
        self.levels, self.label = read_image(request.image, config), read_label(request.label, config)
        # It shares no call: torch promises no equal bits in a larger batch.
        super().__init__("/likelihood")

    @torch.inference_mode()
    def answer(self) -> wire.LikelihoodAnswer:
        nats = -pixel_log_prob(self.champion.model, self.levels, self.label)[0].double()  # (C, H, W)
        total = nats.sum().item()
        return wire.LikelihoodAnswer(
            log_prob=-total,
            bits_per_dim=bits_per_dim(total, self.champion.model.config.image_shape),
            packed_bytes=packed_bytes(-total),
            surprise=nats.sum(dim=0).tolist(),
            model=self.champion.identity,
        )
