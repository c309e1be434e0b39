"""Models known by hand, registered as trainings register theirs: quick material for promotions."""

import math
from pathlib import Path
from typing import Any

import torch

from pipelines.params import PromoteParams
from pipelines.promotion.move import run_promotion
from pipelines.registry import runs as tracking
from pipelines.registry import store
from pipelines.registry import versions as registry
from pipelines.registry.decisions import Report
from pixelcnn import Dataset, GatedPixelCNNConfig, build_model, evaluate, load_dataset, save_checkpoint, save_dataset
from pixelcnn.evaluation import CHECKED_SCORE, checked_score

PARAMS = PromoteParams(confidence=0.95, batch_size=50, max_sample_s=60)
INK = 0.1  # of the toy images: a model that says so is the best there is
CONFIG = GatedPixelCNNConfig(image_shape=(1, 4, 4), num_levels=2, num_features=2, num_layers=1, kernel_size=3)


class Toy:
    """A dataset, and versions of its registered model that put the same probability on ink everywhere."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.data = self.prepare(seed=0)
        self.weight_seed = 0

    def prepare(self, seed: int) -> Dataset:
        generator = torch.Generator().manual_seed(seed)
        images = (torch.rand((600, 1, 4, 4), generator=generator) < INK).to(torch.uint8)
        parts = dict(zip(("train", "validation", "test"), images.split([100, 400, 100]), strict=True))
        data = Dataset(
            name=self.name,
            num_levels=2,
            protocol="toy",
            label_names=["a", "b"],
            images=parts,
            labels={split: torch.zeros(len(part), dtype=torch.int64) for split, part in parts.items()},
        )
        path = self.folder / "data" / f"{self.name}.safetensors"
        save_dataset(path, data)
        return load_dataset(path)

    def model(self, ink: float):
        torch.manual_seed(self.weight_seed)
        self.weight_seed += 1
        model = build_model(CONFIG).eval()
        with torch.no_grad():
            model.logits.weight.zero_()
            model.logits.bias.copy_(torch.tensor([1 - ink, ink]).log())
        return model

    def checkpoint(self, ink: float, data: Dataset, broken: bool) -> tuple[Path, dict]:
        model = self.model(ink)
        scores = {
            **evaluate(model, data),
            CHECKED_SCORE: checked_score(model, data),
            **{"dataset": self.name, "protocol": data.protocol, "label_names": data.label_names},
            "data_hash": data.data_hash,
        }
        if broken:
            with torch.no_grad():
                model.logits.bias.fill_(math.nan)
        folder = self.folder / "models" / str(self.weight_seed)
        save_checkpoint(folder, model, scores)
        return folder, scores

    def train(self, ink: float) -> str:
        """Record and register a model exactly as the training flow does; return the version."""
        folder, scores = self.checkpoint(ink, self.data, broken=False)
        training = tracking.Training(
            pair=f"gated_pixelcnn-{self.name}",
            dataset=self.name,
            data_hash=self.data.data_hash,
            tags={"git_commit": "c0ffee", "protocol": self.data.protocol},
        )
        run_id = tracking.start_training_run(training, key=str(folder))
        model_id = tracking.log_training_run(run_id, training, folder, scores)
        return tracking.register(run_id, model_id, folder, training.pair, self.name)

    def register(self, ink: float, data: Dataset | None = None, broken: bool = False, nll: float | None = None) -> str:
        """Do the same in a tenth of the time: without MLflow's own wrapping of the model."""
        data = data or self.data
        folder, scores = self.checkpoint(ink, data, broken)
        client = tracking.client()
        run = client.create_run(tracking.experiment_id(self.name))
        client.log_artifacts(run.info.run_id, str(folder), f"model/artifacts/{tracking.CHECKPOINT_NAME}")
        if not client.search_registered_models(f"name='{self.model_name}'"):
            client.create_registered_model(self.model_name)
        tags = {
            "pair": f"gated_pixelcnn-{self.name}",
            "dataset": self.name,
            "data_hash": data.data_hash,
            "protocol": data.protocol,
            "weights_sha256": registry.sha256_of(folder / "model.safetensors"),
            "git_commit": "c0ffee",
            "validation/nll_nats": str(scores["validation/nll_nats"] if nll is None else nll),
        }
        source = f"{run.info.artifact_uri}/model"
        return str(client.create_model_version(self.model_name, source, run.info.run_id, tags).version)

    def promote(self, only: str | int | None = None) -> Report:
        return run_promotion(self.name, self.data, PARAMS, only=only and int(only))

    @property
    def aliases(self) -> dict[str, str]:
        return registry.aliases(self.name)

    @property
    def model_name(self) -> str:
        return f"pixelcnn-{self.name}"

    def served(self) -> dict[str, Any]:
        """Return the metadata of the model that the store calls the latest."""
        return store.metadata_of(str(store.latest(self.model_name)))

    def stored(self) -> list[str]:
        return sorted(f.name for f in (store.home() / "models" / self.model_name).iterdir() if f.is_dir())
