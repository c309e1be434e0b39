"""params.yaml: the project's own file is right, and every mistake in it is a sentence that names the key."""

import itertools
from pathlib import Path

import pytest
import yaml

from pipelines.datasets.entry import OFFICIAL
from pipelines.params import OWN_FILE, QUICK_START, load_params, repro_command
from pixelcnn.models.registry import architectures
from tests.pipelines.projects import ROOT, tiny_params, write_params


@pytest.fixture
def values() -> dict:
    return tiny_params()


def load(folder: Path, values: dict):
    write_params(folder, values)
    return load_params(folder / "params.yaml")


def test_every_model_and_dataset_is_a_pair() -> None:
    params = load_params(ROOT / "params.yaml")
    quick = {"pixelcnn-mnist5k", "gated_pixelcnn-mnist5k"}
    full = {f"{model}-{data}" for model in architectures() for data in OFFICIAL if data != QUICK_START}
    assert set(params.pairs) == quick | full
    for pair in params.pairs.values():
        assert type(pair.network) is architectures()[pair.model]
        spec = params.dataset(pair.dataset)
        assert pair.network.image_shape == spec.image_shape
        assert pair.network.num_levels == spec.num_levels
        assert pair.network.num_labels == len(spec.label_names) == 10
    assert params.pair("pixelcnn-mnist").network.num_features == 32
    assert not params.pair("pixelcnn-mnist").train.horizontal_flips
    assert params.pair("gated_pixelcnn-cifar10").train.horizontal_flips


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "pairs.pixelcnn-mnist.train.learning_rat",
            0.1,
            r"params\.yaml: pairs\.pixelcnn-mnist\.train: unknown key 'learning_rat'\. Known: accumulate, batch_size, ",
        ),
        (
            "pairs.pixelcnn-mnist.network.num_layers",
            3,
            r"mnist\.network: unknown key 'num_layers'\. Known: .*num_blocks",
        ),
        (
            "pairs.pixelcnn-mnist.network.num_levels",
            2,
            r"pairs\.pixelcnn-mnist\.network: num_levels is not to be set here",
        ),
        (
            "pairs.pixelcnn-mnist.epochs",
            3,
            r"unknown key 'pairs\.pixelcnn-mnist\.epochs'\. Known: added, .*model, ",
        ),
        (
            "sample.num_image",
            3,
            r"unknown key 'sample\.num_image'\. Known: num_columns, num_completions, num_images, seed, temperature",
        ),
        ("trian", {}, r"params\.yaml: unknown key 'trian'\. Known: checks, data, datasets, "),
        ("pairs.pixelcnn-mnist.train.learning_rate", -1, r"pairs\.pixelcnn-mnist\.train: learning_rate must .* got -1"),
        ("pairs.pixelcnn-mnist.train.learning_rate", "fast", r"learning_rate must be a number .* got 'fast'"),
        ("pairs.pixelcnn-mnist.train.batch_size", 2.5, r"batch_size must be a whole number .* got 2\.5"),
        ("pairs.pixelcnn-mnist.train", {}, r"train: batch_size, learning_rate, max_epochs must be given, too\.$"),
        ("pairs.pixelcnn-mnist.train", None, r"pairs\.pixelcnn-mnist\.train: it must be a mapping .* got None"),
        ("pairs.pixelcnn-mnist.network.kernel_size", 4, r"pairs\.pixelcnn-mnist\.network: kernel_size must be odd"),
        ("pairs.pixelcnn-cifar10.network.num_features", 4, r"num_features must be a multiple of the 3 colour"),
        ("pairs.pixelcnn-mnist.num_threads", -1, r"pairs\.pixelcnn-mnist\.num_threads must be greater .* got -1"),
        (
            "pairs.pixelcnn-mnist.model",
            "vae",
            r"pairs\.pixelcnn-mnist\.model: unknown model 'vae'\. Known: attentive_pixelcnn, gated_pixelcnn, "
            r"pixelcnn\. One of your own: import its file, or name it in PIXELCNN_ARCHITECTURES \(docs/arch",
        ),
        (
            "pairs.pixelcnn-mnist.model",
            ["x"],
            r"pairs\.pixelcnn-mnist\.model: unknown model \['x'\]\. Known: attentive",
        ),
        ("pairs.pixelcnn-mnist.dataset", ["x"], r"mnist\.dataset: unknown dataset \['x'\]\. Known: mnist5k"),
        ("datasets.mnist.invert", True, r"datasets\.mnist\.invert must not be set: official images are taken as they"),
        ("datasets.mnist.fit", "crop", r"datasets\.mnist\.fit must not be set: official images are taken as they are"),
        (
            "pairs.pixelcnn-mnist.dataset",
            "svhn",
            r"mnist\.dataset: unknown dataset 'svhn'\. Known: mnist5k, mnist, fashion_mnist",
        ),
        ("pairs.pixelcnn-mnist.dataset", "cifar10", r"pair 'pixelcnn-mnist' must be named .* 'pixelcnn-cifar10'"),
        (
            "pairs.pixelcnn-mnist.completer",
            {},
            r"pairs\.pixelcnn-mnist\.completer: it trains nothing: set completer_feat",
        ),
        (
            "pairs.pixelcnn-mnist.context",
            {},
            r"pairs\.pixelcnn-mnist\.context: it trains nothing: set completer_feat",
        ),
        (
            "pairs.pixelcnn-mnist.added_begins_with",
            "gated_pixelcnn-mnist",
            r"pairs\.pixelcnn-mnist\.added_begins_with: nothing begins with it: set added_features in its network",
        ),
        (
            "pairs.pixelcnn-mnist.network.completer_features",
            3,
            r"pairs\.pixelcnn-mnist\.network: completer_features must be 0 where context_features is 0",
        ),
        ("evaluate.completion_images", {"mnist": -1}, r"evaluate\.completion_images\.mnist must be .* got -1"),
        ("evaluate.completion_images", {"svhn": 1}, r"unknown dataset 'svhn'\. Known: mnist5k, "),
        ("evaluate.judges", {"minst": "mnist"}, r"unknown dataset 'minst'\. Known: mnist5k, "),
        ("evaluate.judges", {"mnist": "minst"}, r"unknown dataset 'minst'\. Known: mnist5k, "),
        ("datasets.mnist.use_labels", True, r"unknown key 'datasets\.mnist\.use_labels'"),
        ("pairs", {}, r"pairs must .* got \{\}"),
        ("data.split_seed", True, r"data\.split_seed must be .*integer, got True"),
        ("datasets.mnist.num_levels", 1, r"datasets\.mnist\.num_levels must be .* got 1"),
        ("datasets.mnist.image_shape", [2, 28, 28], r"datasets\.mnist\.image_shape must be \[1 or 3, height"),
        ("datasets.mnist.image_shape", [1, 28, 65], r"image_shape must be \[1 or 3, height, width\], sides up to 64"),
        ("datasets.mnist.label_names", ["a", "a"], r"datasets\.mnist\.label_names holds one twice"),
        ("datasets.mnist.ground", "white", r"datasets\.mnist\.ground must not be set"),
        ("datasets.mnist.skip_broken", True, r"datasets\.mnist\.skip_broken must not be set"),
        ("datasets.mnist.protocol", "8-bit", r"datasets\.mnist\.protocol '8-bit' has 256 levels, got num_levels 2"),
        ("datasets.mnist.source.path", "svhn", r"source\.path must be one of mnist5k, .*, got 'svhn'"),
        (
            "pairs.pixelcnn-mnist.train.horizontal_flips",
            True,
            r"pixelcnn-mnist\.train: horizontal_flips mirrors images",
        ),
        (
            "pairs.gated_pixelcnn-fashion_mnist.train.redrawn_share",
            0.3,
            r"gated_pixelcnn-fashion_mnist\.train: redrawn_share must be 0 with protocol '8-bit': only images kept as "
            r"intensities \(protocol 'dynamic'\) can be drawn anew",
        ),
        (
            "pairs.gated_pixelcnn-mnist.train.joint_share",
            0.1,
            r"gated_pixelcnn-mnist\.train: joint_share must be 1: the network sees no drawings",
        ),
        ("promote.confidence", 95, r"promote\.confidence must be less than or equal to 0\.9999, got 95"),
        ("promote.max_sample_s", "fast", r"promote\.max_sample_s must be number, got 'fast'"),
        ("evaluate.batch_size", 0, r"evaluate\.batch_size must be .* got 0"),
        ("sample.temperature", float("nan"), r"sample\.temperature must be .* got nan"),
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


def test_a_part_that_cannot_learn_so_is_named_before_any_is_trained(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["pairs"]["gated_pixelcnn-mnist"]["labels"]["joint_share"] = 0.1
    with pytest.raises(ValueError, match=r"gated_pixelcnn-mnist\.labels: joint_share must be 1: the network sees no"):
        load(tmp_path, values)


def test_the_command_that_makes_something_names_the_file_of_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / OWN_FILE).write_text("pairs: {stacked-mnist5k: {}, dilated-net-mnist: {}}")
    for file in ("dvc.yaml", "full/dvc.yaml"):
        for stage, values in yaml.safe_load((ROOT / file).read_text())["stages"].items():
            for parts in itertools.product(*values["matrix"].values()):
                expected = f"dvc repro {'' if file == 'dvc.yaml' else f'{file}:'}{stage}@{'-'.join(parts)}"
                assert repro_command(stage, "-".join(parts)) == expected
    for own in ("stacked-mnist5k", "dilated-net-mnist", "pixelcnn-letters", "letters"):
        assert repro_command("train", own) == f"dvc repro own/dvc.yaml:train@{own}"


def test_missing_keys_are_named(tmp_path: Path, values: dict) -> None:
    del values["pairs"]["pixelcnn-mnist"]["train"]["batch_size"]
    with pytest.raises(ValueError, match=r"pairs\.pixelcnn-mnist\.train: .*batch_size"):
        load(tmp_path, values)


@pytest.mark.parametrize("key", ["network", "train"])
def test_a_pair_without_a_section_is_told_so(tmp_path: Path, values: dict, key: str) -> None:
    del values["pairs"]["pixelcnn-mnist"][key]
    with pytest.raises(ValueError, match=rf"^params\.yaml: key 'pairs\.pixelcnn-mnist\.{key}' is missing\.$"):
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
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfed")  # as some editors of Windows write
    with pytest.raises(ValueError, match=r"params\.yaml is no YAML: 'utf-8' codec can't decode"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["datasets: [a]", "pairs: 5", "[]", "5", "sample: {}"])
def test_own_entries_stand_by_name(tmp_path: Path, values: dict, text: str) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/params.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"own/params\.yaml must hold entries by name under `datasets` and `pairs`"):
        load(tmp_path, values)
    (tmp_path / "own/params.yaml").write_text("datasets:\npairs:\n")
    assert load(tmp_path, values).pairs.keys() == values["pairs"].keys()
    values["pairs"]["pixelcnn-mnist"]["num_threads"] = -1
    with pytest.raises(ValueError, match=r"^params\.yaml: pairs\.pixelcnn-mnist\.num_threads"):
        load(tmp_path, values)


def test_no_key_stands_twice() -> None:
    """YAML takes the last of two equal keys without a word."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key) for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"a key stands twice near line {node.start_mark.line + 1}: {keys}"
            return super().construct_mapping(node, deep)

    yaml.load((ROOT / "params.yaml").read_text(), Loader=Strict)


def test_an_interrupted_quick_start_goes_on_from_a_state_of_seconds_ago() -> None:
    params = load_params()
    for name in ("pixelcnn-mnist5k", "gated_pixelcnn-mnist5k"):
        assert params.pair(name).train.save_minutes <= 0.25, name  # it trains for about a minute in all


def test_a_mistake_in_ones_own_entry_is_named_with_its_file(tmp_path: Path, values: dict) -> None:
    (tmp_path / "own").mkdir()
    own = {"datasets": {"glyphs": values["datasets"]["mnist"] | {"num_levels": 1}}}
    (tmp_path / "own/params.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(ValueError, match=r"^own/params\.yaml: datasets\.glyphs\.num_levels must be .* got 1"):
        load(tmp_path, values)
    (tmp_path / "own/params.yaml").write_text(yaml.safe_dump({"pairs": {"mine": values["pairs"]["pixelcnn-mnist"]}}))
    with pytest.raises(ValueError, match=r"^own/params\.yaml: pair 'mine' must be named .* 'pixelcnn-mnist' for its"):
        load(tmp_path, values)


@pytest.mark.parametrize("name", ["fit", "source", "flips"])
def test_a_dataset_may_be_named_like_a_key(tmp_path: Path, values: dict, name: str) -> None:
    values["datasets"][name] = values["datasets"]["mnist"] | {"use_labels": True}
    with pytest.raises(ValueError, match=rf"unknown key 'datasets\.{name}\.use_labels'\. Known: fit, flips, ground, "):
        load(tmp_path, values)


def test_no_name_stands_in_both_files(tmp_path: Path, values: dict) -> None:
    (tmp_path / "own").mkdir()
    text = yaml.safe_dump({"datasets": {"mnist": values["datasets"]["mnist"]}})
    (tmp_path / "own/params.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^'mnist' stands in params\.yaml and in own/params\.yaml: take it out"):
        load(tmp_path, values)
