"""The evaluate stage: trained weights -> scores, pictures, and the model card."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from pipelines.files import atomic_write
from pipelines.judging.acceptance import KNOWN, acceptance, judged_images
from pipelines.judging.judge import JUDGES, load_judge
from pipelines.params import load_params, repro_command
from pipelines.reports import curve as training_report
from pipelines.reports.card import model_card
from pipelines.stages.train import TRAINED_FOLDER, Log, inputs_of, load, set_torch_threads
from pixelcnn import evaluation
from pixelcnn.checkpoint import check_replaceable, load_checkpoint, save_checkpoint
from pixelcnn.completion import score_completions
from pixelcnn.data import DYNAMIC_PROTOCOL, Dataset
from pixelcnn.models.registry import config_to_dict

MODELS_FOLDER, REPORTS_FOLDER = Path("models"), Path("reports")

logger = logging.getLogger(__name__)


def baseline_scores(data: Dataset) -> dict[str, float]:
    """Score two models without a network on the test split: what any network must beat by far.

    Returns:
        `test/nll_nats_uniform`: every level equally likely; `test/nll_nats_independent`: each sub-pixel's own
        distribution of levels, counted on the training split with one added to each count.
    """
    num_dims, num_levels = math.prod(data.image_shape), data.num_levels
    images = data.images["train"].flatten(1)  # (N, C*H*W) uint8
    if data.protocol == DYNAMIC_PROTOCOL:
        ink = images.double().sum(dim=0) / 255  # the expected count of ones
        counts = torch.stack([len(images) - ink, ink])  # (2, C*H*W)
    else:
        counts = torch.stack([(images == level).sum(dim=0) for level in range(num_levels)]).double()  # (K, C*H*W)
    log_probs = ((counts + 1) / (len(images) + num_levels)).log()
    test = data.images["test"].flatten(1).long()
    nll = -log_probs.gather(0, test).sum(dim=1)
    return {"test/nll_nats_uniform": num_dims * math.log(num_levels), "test/nll_nats_independent": nll.mean().item()}


def evaluate(
    name: str, trained: Path | None = None, out: Path | None = None, report: Path | None = None, log: Log = logger.info
) -> None:
    """Score a trained pair; write its checkpoint with scores and card, and the folder of reports.

    Args:
        trained: what `train` wrote; None for `trained/PAIR`.
        out: folder of the checkpoint, whose `scores.json` is the training's record and all scores; None for
            `models/PAIR`.
        report: folder of metrics, curve and pictures; None for `reports/PAIR`.

    Raises:
        ValueError: the data or the trained weights are not as they should be; `out` holds something else.
    """
    params = load_params()
    pair = params.pair(name)
    trained, out = trained or TRAINED_FOLDER / name, out or MODELS_FOLDER / name
    report = report or REPORTS_FOLDER / name
    check_replaceable(out)
    data = load(pair.dataset)
    if not trained.exists():
        raise ValueError(f"{trained} does not exist. Make it: {repro_command('train', name)}")
    model, record = load_checkpoint(trained)
    if not {"data_hash", "pair", "weights_dtype"} <= record.keys():
        raise ValueError(
            f"{trained} was not written by the train stage. Register it: pipelines.steps register {trained}"
        )
    if record["data_hash"] != data.data_hash:
        raise ValueError(f"{trained} was trained on other data than data/{data.name}.safetensors. Train it again.")
    judges_of = params.evaluate.judges.get(data.name)
    judges = {which: load_judge(judges_of, which, data) for which in JUDGES} if judges_of else {}
    # How models are scored, or the code, was changed since: the scores do not follow from those inputs.
    if record.get("inputs_sha256") not in [inputs_of(name, params, data, half) for half in (False, True)]:
        record.pop("inputs_sha256", None)
    set_torch_threads(pair)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    log(f"scoring {name} on {next(model.parameters()).device}")
    num_images, batch_size = params.evaluate.num_images or None, params.evaluate.batch_size
    per_image: dict[str, torch.Tensor] = {}
    scores: dict[str, Any] = {}
    scores |= evaluation.evaluate(model, data, num_images=num_images, batch_size=batch_size, per_image=per_image)
    scores["test/nll_nats_max"] = per_image["test"].max().item()
    if model.config.context_features:
        limits = (params.evaluate.completion_images.get(data.name), num_images)
        num_completed = min((limit for limit in limits if limit), default=None)
        scores |= evaluation.evaluate_completion(model, data, "test", num_completed, batch_size, score_completions)
    scores |= baseline_scores(data)
    first, name_of_first = evaluation.CHECKED_IMAGES, evaluation.CHECKED_SCORE
    scores[name_of_first] = evaluation.checked_score(model, data, batch_size)
    if model.config.num_labels:
        given = evaluation.per_image_nll(model, data, "test", True, first, batch_size)
        marginal = evaluation.per_image_marginal_nll(model, data, "test", first, batch_size)
        scores[f"{name_of_first}_given_label"] = given.mean().item()
        scores[f"{name_of_first}_label_summed_out"] = marginal.mean().item()
    scores |= record
    for key in ("validation/nll_nats", "test/nll_nats", "test/nll_nats_uniform", "test/nll_nats_independent"):
        nll = evaluation.format_nll(scores[key], data.image_shape, data.num_levels)
        log(f"{key}: {nll} ({data.name} {data.protocol})")
    model.cpu()  # where sampling is fast
    if judges:
        images = judged_images(model, data, params.evaluate.judged_images or None)
        for which, judge in judges.items():
            shares = acceptance(images, data.num_levels, judge)
            scores |= {f"{name_of_share}_by_{which}": share for name_of_share, share in shares.items()}
        scores["judges_of"] = judges_of
        accepted = [f"{scores[f'test/accepted_{known}_by_judge']:.2f} of {what}" for known, what in KNOWN.items()]
        log(f"accepted by the judge: {', '.join(accepted)}")
    card = model_card(config_to_dict(model.config), scores)
    texts = ("protocol", "data_hash")
    told = {key: value for key, value in scores.items() if isinstance(value, int | float) or key in texts}
    atomic_write(report / "metrics.json", json.dumps(told, indent=2) + "\n")
    curves = {}
    for part, file in training_report.CURVE_FILES.items():
        (report / file).unlink(missing_ok=True)  # of an earlier training, which may have had more parts
        if (trained / file).exists():
            shutil.copyfile(trained / file, report / file)
            curves[part] = training_report.read_curve(report / file)
    training_report.draw_curve(report / "curve.png", curves, scores, f"{data.name}, {data.protocol}")
    training_report.draw_extremes(report / "extremes.png", data, per_image["test"])
    training_report.draw_samples(report / "samples.png", model, params.sample)
    (report / "class_samples.png").unlink(missing_ok=True)
    if model.config.num_labels:
        training_report.draw_samples(report / "class_samples.png", model, params.sample, per_class=True)
    training_report.draw_completions(report / "completions.png", model, data, params.sample)
    # Last: whoever finds the checkpoint finds its reports, too.
    save_checkpoint(out, model, scores, getattr(torch, record["weights_dtype"]), card)
