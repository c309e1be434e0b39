"""params.yaml: the project's own file is right, and every mistake in it is a sentence that names the key."""

from pathlib import Path

import pytest
import yaml
from projects import ROOT, tiny_params, write_params

from pipelines.params import DATASETS, load_params
from pixelcnn.config import GatedPixelCNNConfig, PixelCNNConfig


@pytest.fixture
def values() -> dict:
    return tiny_params()


def load(folder: Path, values: dict):
    write_params(folder, values)
    return load_params(folder / "params.yaml")


def test_every_model_and_dataset_is_a_pair() -> None:
    params = load_params(ROOT / "params.yaml")
    assert set(params.pairs) == {f"{model}-{data}" for model in ("pixelcnn", "gated_pixelcnn") for data in DATASETS}
    for name, pair in params.pairs.items():
        assert isinstance(pair.network, PixelCNNConfig if name.startswith("pixelcnn") else GatedPixelCNNConfig)
        assert pair.network.image_shape == DATASETS[pair.dataset].image_shape
        assert pair.network.num_levels == DATASETS[pair.dataset].num_levels
        assert pair.network.num_labels == len(DATASETS[pair.dataset].label_names) == 10
    assert params.pair("pixelcnn-mnist").network.num_features == 32
    assert not params.pair("pixelcnn-mnist").train.horizontal_flips
    assert params.pair("gated_pixelcnn-cifar10").train.horizontal_flips


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "pairs.pixelcnn-mnist.train.learning_rat",
            0.1,
            r"params\.yaml: unknown key 'pairs\.pixelcnn-mnist\.train\.learning_rat'\. Known: accumulate, batch_size, ",
        ),
        ("pairs.pixelcnn-mnist.network.num_layers", 3, r"unknown key '.*network\.num_layers'\. Known: .*num_blocks"),
        ("pairs.pixelcnn-mnist.network.num_levels", 2, r"unknown key 'pairs\.pixelcnn-mnist\.network\.num_levels'"),
        (
            "pairs.pixelcnn-mnist.epochs",
            3,
            r"unknown key 'pairs\.pixelcnn-mnist\.epochs'\. Known: completer, .*model, ",
        ),
        (
            "sample.num_image",
            3,
            r"unknown key 'sample\.num_image'\. Known: num_columns, num_completions, num_images, seed, temperature",
        ),
        ("trian", {}, r"params\.yaml: unknown key 'trian'\. Known: candidates, data, "),
        ("pairs.pixelcnn-mnist.train.learning_rate", -1, r"pairs\.pixelcnn-mnist\.train: learning_rate must .* got -1"),
        ("pairs.pixelcnn-mnist.train.learning_rate", "fast", r"learning_rate must be a number .* got 'fast'"),
        ("pairs.pixelcnn-mnist.train.batch_size", 2.5, r"batch_size must be a whole number .* got 2\.5"),
        ("pairs.pixelcnn-mnist.train", None, r"pairs\.pixelcnn-mnist\.train must be a mapping .* got None"),
        ("pairs.pixelcnn-mnist.network.kernel_size", 4, r"pairs\.pixelcnn-mnist\.network: kernel_size must be odd"),
        ("pairs.gated_pixelcnn-cifar10.network.num_features", 4, r"num_features must be a multiple of the 3 colour"),
        ("pairs.pixelcnn-mnist.num_threads", -1, r"pairs\.pixelcnn-mnist\.num_threads must be .* got -1"),
        (
            "pairs.pixelcnn-mnist.model",
            "vae",
            r"unknown model 'vae' in 'pairs\.pixelcnn-mnist\.model'\. Known: pixel",
        ),
        ("pairs.pixelcnn-mnist.dataset", "svhn", r"unknown dataset 'svhn' .* Known: mnist5k, mnist, fashion_mnist"),
        ("pairs.pixelcnn-mnist.dataset", "cifar10", r"pair 'pixelcnn-mnist' must be named .* 'pixelcnn-cifar10'"),
        (
            "pairs.pixelcnn-mnist.completer",
            {},
            r"'pairs\.pixelcnn-mnist\.completer' trains nothing: set completer_feat",
        ),
        (
            "pairs.pixelcnn-mnist.network.completer_features",
            3,
            r"pairs\.pixelcnn-mnist\.network: completer_features must be 0 where context_features is 0",
        ),
        ("pairs.pixelcnn-mnist.completion_images", -1, r"pairs\.pixelcnn-mnist\.completion_images must be .* got -1"),
        ("candidates.mnist", ["pixelcnn-cifar10"], r"candidates\.mnist names 'pixelcnn-cifar10', which is no pair of"),
        ("candidates.mnist", [], r"candidates\.mnist must be a list of one or two pairs, got \[\]"),
        ("candidates.svhn", ["pixelcnn-mnist"], r"unknown dataset 'candidates\.svhn'"),
        ("default_targets", "promote@mnist5k", r"default_targets must be a list of stage names, got 'promote@mnist5k'"),
        ("data.split_seed", True, r"data: split_seed must be a whole number .* got True"),
        ("promote.confidence", 95, r"promote: confidence must be a number from 0\.5 to 0\.9999, got 95"),
        ("promote.max_sample_s", "fast", r"promote: max_sample_s must be a number from 0 to 86400, got 'fast'"),
        ("evaluate.batch_size", 0, r"evaluate: batch_size must be .* got 0"),
        ("sample.temperature", float("nan"), r"sample: temperature must be .* got nan"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, values: dict, path: str, value: object, message: str) -> None:
    *parents, key = path.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[key] = value
    with pytest.raises(ValueError, match=message):
        load(tmp_path, values)


def test_missing_keys_are_named(tmp_path: Path, values: dict) -> None:
    del values["pairs"]["pixelcnn-mnist"]["train"]["batch_size"]
    with pytest.raises(ValueError, match=r"key 'pairs\.pixelcnn-mnist\.train\.batch_size' is missing"):
        load(tmp_path, values)


def test_unknown_pair(tmp_path: Path, values: dict) -> None:
    with pytest.raises(ValueError, match=r"unknown pair 'pixelcnn-svhn'\. Known pairs in params\.yaml: pixelcnn-"):
        load(tmp_path, values).pair("pixelcnn-svhn")


def test_no_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"params\.yaml does not exist here"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("pairs: {a: [}")
    with pytest.raises(ValueError, match=r"params\.yaml is no YAML: .* line 1"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("")
    with pytest.raises(ValueError, match=r"the file must be a mapping .* got None"):
        load_params(tmp_path / "params.yaml")


def test_no_key_stands_twice() -> None:
    """YAML takes the last of two equal keys without a word."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key) for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"a key stands twice near line {node.start_mark.line + 1}: {keys}"
            return super().construct_mapping(node, deep)

    yaml.load((ROOT / "params.yaml").read_text(), Loader=Strict)
