"""The model card: what a checkpoint is, in words around its measured values. It goes with the weights as README.md."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pipelines.datasets.entry import OFFICIAL
from pipelines.judging.acceptance import KNOWN
from pipelines.params import repro_command
from pixelcnn.likelihood import bits_per_dim

_WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text())


def title(pair: str, config: Mapping[str, Any]) -> str:
    """Return what the model is, e.g. `PixelCNN on mnist`."""
    return f"{model_words(config)[0]} on {pair.removeprefix(config['model'] + '-')}"


def model_words(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of a config's architecture in words, and its paper; of a third person's its own name alone."""
    name, paper = _WORDS["models"].get(config["model"], (config["model"], ""))
    return name, paper


def score_text(scores: Mapping[str, Any], split: str, config: Mapping[str, Any]) -> str:
    """Return a split's NLL with its standard error, in the unit of the field: nats for binary images, else bits/dim."""
    nats, error = scores[f"{split}/nll_nats"], scores[f"{split}/nll_nats_stderr"]
    if config["num_levels"] == 2:
        return f"{nats:.2f} ± {error:.2f} nats"
    bits = scores[f"{split}/bits_per_dim"]
    return f"{bits:.4f} ± {error * bits / nats:.4f} bits/dim"


def given_label(scores: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the test NLL with the true label given, in the unit of the field; nothing for a model without labels."""
    nats = scores.get("test/nll_nats_given_label")
    if nats is None:
        return ""
    return f"{nats:.2f}" if config["num_levels"] == 2 else f"{bits_per_dim(nats, config['image_shape']):.4f}"


def minutes_text(minutes: float) -> str:
    """Return minutes in digits that tell: 0.4, 38."""
    return f"{minutes:.{1 if minutes < 10 else 0}f}"


def render(template: str, **values: Any) -> str:
    """Fill in a template of `templates/`; a value that it asks for and that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("pipelines.reports"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {f.__name__: f for f in (title, score_text, given_label, minutes_text, repro_command)}
    # `completes` is a score that every model with a context network has.
    environment.globals |= {"known": KNOWN, "masks": _WORDS["masks"], "completes": "test/completion_top_nats"}
    return environment.get_template(template).render(values)


def model_card(config: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """Return the card, in Markdown, of what `config.json` and `scores.json` hold."""
    pair, dataset = scores["pair"], scores["dataset"]
    model, paper = model_words(config)
    summed_out = [key for key in scores if key.endswith("_label_summed_out")]
    elsewhere = ("model", "image_shape", "num_levels", "weights_sha256")
    return render(
        "card.md.j2",
        **{"pair": pair, "dataset": dataset, "model": model, "paper": paper, "config": config, "scores": scores},
        **_WORDS["datasets"].get(dataset, _WORDS["own"]),
        network=", ".join(f"{name} {value}" for name, value in config.items() if name not in elsewhere),
        is_official=dataset in OFFICIAL,
        first=summed_out[0].removesuffix("_label_summed_out") if summed_out else "",
        most_by_label=math.log(max(config["num_labels"], 1)),
    )
