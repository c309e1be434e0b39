"""The logged model: what `mlflow.pyfunc.load_model` makes of a checkpoint folder. Code and safetensors, no pickle."""

from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.likelihood import log_prob


class LoggedModel(PythonModel):
    """Scores images: (N, C, H, W) int64 levels -> (N,) float32 log-probabilities in nats."""

    def load_context(self, context: Any) -> None:
        self.model, _ = load_checkpoint(context.artifacts["checkpoint"])

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> np.ndarray:
        with torch.inference_mode():
            return log_prob(self.model, torch.as_tensor(np.asarray(model_input))).numpy()


mlflow.models.set_model(LoggedModel())
