"""Images to bytes and back: the compiled sampler says how probable each level is, constriction codes the levels.

Packing goes through an image by the code that samples one, and so does unpacking: both compute the same bits, because
they do the same. The library makes fixed-point numbers of the float32 probabilities (24 bits, none of them zero).
"""

import ctypes
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import constriction
import numpy as np
import torch
from torch import Tensor

from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.sampling.fast import engine_name
from pixelcnn.sampling.naive import Canvas

if TYPE_CHECKING:
    from pixelcnn.sampling.compiled import Engine

ENGINE = "compiled"
MAX_LEVELS = 256

_queue, _models = constriction.stream.queue, constriction.stream.model
_levels_model = _models.Categorical(perfect=False)  # one distribution for each symbol
OnImages = Callable[[int], None]


def code(engine: "Engine", levels: Tensor, labels: list[int], exchange: Callable[[Any, Any], None]) -> Tensor:
    """Go through whole images as a sampler does, while a coder takes or says each level; return their (B,) nats.

    Args:
        levels: (B, C, H, W) int64, contiguous: those to be coded; or any, which are then replaced.
        labels: B numbers, -1 for none.
        exchange: called for each sub-pixel of the batch in turn, with the (B, K) float32 probabilities of its
            levels and the (B,) int32 levels themselves, which it may replace. They are of the same bits whatever
            levels come later, and however many images there are.
    """
    missing = torch.ones_like(levels[:, 0], dtype=torch.bool)
    work = engine.work(Canvas(torch.zeros(levels.shape), torch.tensor(labels), 1.0, levels, missing))
    raised: list[BaseException] = []

    def call() -> None:
        # An exception cannot pass through compiled code, which goes on to the end without the coder.
        if not raised:
            try:
                exchange(work.probs, work.coded)
            except BaseException as error:
                raised.append(error)

    function = ctypes.CFUNCTYPE(None)(call)
    work = work._replace(coder=ctypes.cast(function, ctypes.c_void_p).value or 0)
    state = engine.joined([engine.fresh] * len(levels))
    engine.rows(state, work, np.arange(len(levels)), 1.0, 0, levels.shape[2])
    if raised:
        raise raised[0]
    return torch.from_numpy(work.nats)


class Coder:
    """Codes blocks of images with a model's weights as they are now; ValueError where no compiled sampler can run it.

    Args:
        model: on the CPU.
        batch_images: images that are coded in turns, sub-pixel by sub-pixel; a part of the format.
    """

    def __init__(self, model: AutoregressiveModel, batch_images: int) -> None:
        if engine_name(model) != "cached, compiled":
            raise ValueError(f"packing needs the compiled sampler, but sampling is {engine_name(model)}.")
        if model.config.num_levels > MAX_LEVELS:
            raise ValueError(f"packing takes up to {MAX_LEVELS} levels, the model has {model.config.num_levels}.")
        from pixelcnn.sampling.compiled import build_engine
        from pixelcnn.sampling.kernels import MACHINE

        self.config, self.batch_images = model.config, batch_images
        self.engine = build_engine(model)
        self.arithmetic = f"{self.engine.weights.dtype} on {MACHINE}"  # what the last bits of results depend on
        self._label_model = _models.Uniform(max(model.config.num_labels, 1) + 1)  # one more for none

    def encode(self, levels: Tensor, labels: Tensor | None, on_images: OnImages) -> tuple[bytes, float]:
        """Return a block of images, (N, C, H, W) int64 in [0, K), as bytes, and their nats given the labels.

        Args:
            labels: (N,) int64, -1 for none; None if no labels are to be kept.
            on_images: called with the number of images that are done since the last call.
        """
        encoder = _queue.RangeEncoder()
        if labels is not None:
            encoder.encode((labels + 1).int().numpy(), self._label_model)
        nats = self._walk(levels, labels, lambda probs, coded: encoder.encode(coded, _levels_model, probs), on_images)
        return encoder.get_compressed().astype("<u4").tobytes(), nats

    def decode(
        self, block: bytes, num_images: int, has_labels: bool, on_images: OnImages
    ) -> tuple[Tensor, Tensor | None]:
        """Return the levels and labels of a block that `encode` made with this model and arithmetic.

        Other bytes are a ValueError, but not always noticed: compare a checksum.
        """
        levels, labels = torch.zeros(num_images, *self.config.image_shape, dtype=torch.int64), None

        def exchange(probs: Any, coded: Any) -> None:
            coded[:] = decoder.decode(_levels_model, probs)

        try:
            decoder = _queue.RangeDecoder(np.frombuffer(block, "<u4").astype(np.uint32))
            if has_labels:
                labels = torch.from_numpy(decoder.decode(self._label_model, num_images)).long() - 1
            self._walk(levels, labels, exchange, on_images)
        except (AssertionError, ValueError) as error:  # the library's own
            raise ValueError(f"no code of this model ({error})") from None
        return levels, labels

    def _walk(
        self, levels: Tensor, labels: Tensor | None, exchange: Callable[[Any, Any], None], on_images: OnImages
    ) -> float:
        nats = 0.0
        for start in range(0, len(levels), self.batch_images):
            batch = levels[start : start + self.batch_images].contiguous()
            numbers = [-1] * len(batch) if labels is None else labels[start : start + len(batch)].tolist()
            nats += code(self.engine, batch, numbers, exchange).sum().item()
            levels[start : start + len(batch)] = batch
            on_images(len(batch))
        return nats

    def probe(self) -> str:
        """Return a digest of all that is computed for two images: where it is equal, so are the bits of others."""
        shape, num_levels = self.config.image_shape, self.config.num_levels
        noise = np.frombuffer(hashlib.shake_256(b"pixelcnn").digest(int(np.prod(shape))), np.uint8)
        levels = torch.zeros(2, *shape, dtype=torch.int64)
        levels[0] = torch.from_numpy(noise.astype(np.int64) * num_levels // 256).view(shape)
        digest, encoder = hashlib.sha256(), _queue.RangeEncoder()

        def exchange(probs: Any, coded: Any) -> None:
            digest.update(probs.tobytes())
            encoder.encode(coded, _levels_model, probs)

        self._walk(levels, torch.tensor([-1, self.config.num_labels - 1]), exchange, lambda num: None)
        digest.update(encoder.get_compressed().astype("<u4").tobytes())
        return digest.hexdigest()
