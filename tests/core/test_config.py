import dataclasses

import pytest

from pixelcnn import GatedPixelCNNConfig, PixelCNNConfig
from pixelcnn.models.registry import config_from_dict, config_to_dict, model_name
from tests.core.tiny import ARCHITECTURES, beginning, tiny_config

GOOD = {
    PixelCNNConfig: {"image_shape": (3, 4, 4), "num_levels": 2, "num_features": 6, "num_blocks": 1},
    GatedPixelCNNConfig: {
        "image_shape": (3, 4, 4), "num_levels": 2, "num_features": 6, "num_layers": 1, "kernel_size": 3
    },
}  # fmt: skip

BAD = [
    ({"image_shape": (4, 4)}, "image_shape must be three whole numbers (C, H, W), got (4, 4)."),
    ({"image_shape": 28}, "image_shape must be three whole numbers (C, H, W), got 28."),
    ({"image_shape": (3, 0, 4)}, "H in image_shape must be a whole number of at least 1, got 0."),
    ({"image_shape": (3, 4, 257)}, "W in image_shape must be at most 256, got 257."),
    ({"image_shape": (3, 4, 4.0)}, "W in image_shape must be a whole number of at least 1, got 4.0."),
    ({"num_levels": 1}, "num_levels must be a whole number of at least 2, got 1."),
    ({"num_levels": True}, "num_levels must be a whole number of at least 2, got True."),
    ({"num_features": "6"}, "num_features must be a whole number of at least 1, got '6'."),
    ({"num_features": 4}, "num_features must be a multiple of the 3 colour channels, got 4."),
    ({"head_features": 4}, "head_features must be a multiple of the 3 colour channels, got 4."),
    ({"num_labels": -1}, "num_labels must be a whole number of at least 0, got -1."),
    ({"context_features": -1}, "context_features must be a whole number of at least 0, got -1."),
    ({"context_width": True}, "context_width must be a whole number of at least 0, got True."),
    ({"context_width": 8}, "context_width must be 0 where context_features is 0, got 8."),
    ({"context_scales": 2}, "context_scales must be 0 where context_features is 0, got 2."),
    ({"context_features": 3, "context_scales": 10}, "context_scales must be at most 9, got 10."),
    ({"completer_features": 4}, "completer_features must be 0 where context_features is 0, got 4."),
    ({"completer_features": True}, "completer_features must be a whole number of at least 0, got True."),
    ({"kernel_size": 4}, "kernel_size must be odd, so that it has a centre, got 4."),
    ({"kernel_size": 1}, "kernel_size must be a whole number of at least 3, got 1."),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
@pytest.mark.parametrize("config_class", GOOD)
def test_impossible_values_are_named(config_class, bad, message):
    config_class(**GOOD[config_class])
    with pytest.raises(ValueError, match=beginning(message)):
        config_class(**{**GOOD[config_class], **bad})


@pytest.mark.parametrize(
    ("config_class", "bad", "name"),
    [
        (PixelCNNConfig, {"num_blocks": 0}, "num_blocks must be"),
        (PixelCNNConfig, {"first_kernel_size": 6}, "first_kernel_size must be odd"),
        (GatedPixelCNNConfig, {"num_layers": 0}, "num_layers must be"),
        (GatedPixelCNNConfig, {"max_dilation": 0}, "max_dilation must be"),
        (GatedPixelCNNConfig, {"max_dilation": 257}, "max_dilation must be at most 256"),
    ],
)
def test_impossible_values_of_one_architecture_are_named(config_class, bad, name):
    with pytest.raises(ValueError, match=name):
        config_class(**{**GOOD[config_class], **bad})


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [({}, True), ({"num_labels": 0}, True), ({"num_labels": 3}, False), ({"num_levels": 9}, False),
     ({"image_shape": (3, 4, 4)}, False), ({"num_features": 9}, True)],
)  # fmt: skip
def test_models_are_for_the_same_images_unless_they_know_other_labels(changes, is_same):
    one = tiny_config("pixelcnn", (3, 4, 5), 4, num_labels=2)
    other = dataclasses.replace(one, **changes)
    assert one.for_same_images(other) is other.for_same_images(one) is is_same


def test_configs_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        PixelCNNConfig((1, 2, 2), 2, 4)  # type: ignore[misc]
    config = tiny_config("pixelcnn", (1, 2, 2), 2)
    with pytest.raises(AttributeError):
        config.num_levels = 3  # type: ignore[misc]
    assert config.head_features == 2 * config.num_features


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dict_round_trip(architecture):
    config = tiny_config(architecture, (3, 2, 4), 5, num_labels=2, head_features=9)
    values = config_to_dict(config)
    assert values["model"] == architecture == model_name(config)
    assert config_from_dict(values) == config
    assert values["model"] == architecture  # the argument is left alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "pixel_cnn"},
            "unknown model 'pixel_cnn'. Known: attentive_pixelcnn, gated_pixelcnn, pixelcnn. One of your own: import "
            "its file, or name it in PIXELCNN_ARCHITECTURES (docs/architectures.md).",
        ),
        ({"num_layer": 3}, "pixelcnn: unknown key 'num_layer'. Known: added_context_width, added_features, "),
        ({"num_levels": 0}, "pixelcnn: num_levels must be a whole number of at least 2, got 0."),
        ({"num_blocks": None}, "pixelcnn: num_blocks must be a whole number of at least 1, got None."),
    ],
)
def test_bad_dict_is_named(change, message):
    values = config_to_dict(tiny_config("pixelcnn", (1, 2, 2), 2)) | change
    with pytest.raises(ValueError, match=beginning(message)):
        config_from_dict(values)


def test_missing_key_is_named():
    values = config_to_dict(tiny_config("pixelcnn", (1, 2, 2), 2))
    del values["num_blocks"]
    with pytest.raises(ValueError, match=r"pixelcnn: .*num_blocks"):
        config_from_dict(values)
    with pytest.raises(ValueError, match="unknown model None"):
        config_from_dict({})
