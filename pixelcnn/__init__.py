"""PixelCNN and Gated PixelCNN: exact likelihoods, sampling and completion of images."""

from pixelcnn.checkpoint import load_checkpoint, save_checkpoint
from pixelcnn.completion import complete, completion_log_prob, resample
from pixelcnn.config import GatedPixelCNNConfig, PixelCNNConfig
from pixelcnn.data import Dataset, load_dataset, save_dataset
from pixelcnn.evaluation import evaluate
from pixelcnn.fast_sampling import sample
from pixelcnn.likelihood import bits_per_dim, log_prob, pixel_log_prob
from pixelcnn.model import build_model
from pixelcnn.sampling import naive_sample
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
    "load_checkpoint",
    "load_dataset",
    "log_prob",
    "naive_sample",
    "pixel_log_prob",
    "resample",
    "sample",
    "save_checkpoint",
    "save_dataset",
]
