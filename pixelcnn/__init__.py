"""PixelCNN and Gated PixelCNN: exact likelihoods, sampling and completion of images."""

from pixelcnn.checkpoint import load_checkpoint, save_checkpoint
from pixelcnn.completion import complete, resample
from pixelcnn.data import Dataset, load_dataset, save_dataset
from pixelcnn.evaluation import evaluate
from pixelcnn.likelihood import bits_per_dim, completion_log_prob, level_probs, log_prob, packed_bytes, pixel_log_prob
from pixelcnn.models.gated_pixelcnn import GatedPixelCNNConfig
from pixelcnn.models.pixelcnn import PixelCNNConfig
from pixelcnn.models.registry import build_model
from pixelcnn.sampling.fast import sample
from pixelcnn.sampling.naive import naive_sample
from pixelcnn.training import TrainConfig, fit

__all__ = [
    "Dataset",
    "GatedPixelCNNConfig",
    "PixelCNNConfig",
    "TrainConfig",
    "bits_per_dim",
    "build_model",
    "complete",
    "completion_log_prob",
    "evaluate",
    "fit",
    "level_probs",
    "load_checkpoint",
    "load_dataset",
    "log_prob",
    "naive_sample",
    "packed_bytes",
    "pixel_log_prob",
    "resample",
    "sample",
    "save_checkpoint",
    "save_dataset",
]
