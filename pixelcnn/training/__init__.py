"""Training: `fit`, what it takes, and what it reports."""

from pixelcnn.training.config import TrainConfig
from pixelcnn.training.state import training_history
from pixelcnn.training.trainer import ContextPredictor, Network, StepReport, Trainer, fit, tell_progress

__all__ = [
    "ContextPredictor",
    "Network",
    "StepReport",
    "TrainConfig",
    "Trainer",
    "fit",
    "tell_progress",
    "training_history",
]
