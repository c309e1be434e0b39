"""Training: `fit`, what it takes, and what it reports."""

from pixelcnn.training.config import TrainConfig
from pixelcnn.training.trainer import ContextPredictor, Network, StepReport, Trainer, fit, read_state, tell_progress

__all__ = ["ContextPredictor", "Network", "StepReport", "TrainConfig", "Trainer", "fit", "read_state", "tell_progress"]
