"""Lineage: from a served answer to the bytes it came from, and forward again.

    python -m pipelines.lineage --version pixelcnn-mnist/3   # or a JSON file: an answer of the service, or its `model`
    python -m pipelines.lineage --data HASH                  # every version trained on it, and which one is served

With `--verify` the checksums and a score are computed again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines import registry, store, tracking
from pipelines.promotion_flow import history_line
from pipelines.registry import Version
from pipelines.release import check_scores
from pipelines.steps import is_for_user, run
from pipelines.training_flow import recorded_hash
from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.data import Dataset, load_dataset

DATA_FOLDER = Path("data")
MIN_HASH = 6  # the shortest beginning of a data hash that is looked up


def find_version(text: str) -> Version:
    """Return the version that is meant.

    Args:
        text: `NAME/NUMBER`, or the path of a JSON file that holds an answer of the service or its `model`.

    Raises:
        ValueError: it is neither, or the file contradicts the registry.
        LookupError: nothing of this name and number is registered.
    """
    if Path(text).is_file():
        model = _served_model(Path(text))
        version = _registered(str(model["name"]), str(model["version"]))
        for key, value in version.lineage().items():
            if str(model.get(key, value)) != value:
                raise ValueError(
                    f"{text} says {key} {model[key]}, but {_name(version)} has {value}: set MLFLOW_TRACKING_URI to the "
                    "registry that it was served from."
                )
        return version
    name, _, number = text.rpartition("/")
    if not name or not number.isdigit():
        raise ValueError(f"{text!r} is neither a version, like pixelcnn-mnist/3, nor a JSON file of an answer.")
    return _registered(name, number)


def _served_model(path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is no JSON. Save an answer of the service, or its `model`.") from None
    model = answer.get("model", answer) if isinstance(answer, dict) else None
    if not isinstance(model, dict) or not {"name", "version"} <= model.keys():
        raise ValueError(f"{path} names no model and version. Save an answer of the service, or its `model`.")
    return model


def _registered(name: str, number: str) -> Version:
    by_name = {tracking.registered_name(dataset): dataset for dataset in registry.datasets()}
    if name not in by_name:
        known = ", ".join(by_name) or "none"
        raise LookupError(f"no model {name!r} is registered in {tracking.tracking_uri()}. Known: {known}.")
    versions = {version.version: version for version in registry.versions(by_name[name])}
    if number not in versions:
        raise LookupError(f"{name} has no version {number}. Known: {', '.join(versions)}.")
    return versions[number]


def find_data(data_hash: str) -> tuple[str, list[Version]]:
    """Return the full hash, and every version trained on these data, by dataset and age.

    Args:
        data_hash: MD5 of a prepared file, or its beginning.

    Raises:
        ValueError: too short, or the beginning of several.
        LookupError: nothing was trained on them.
    """
    if len(data_hash) < MIN_HASH:
        raise ValueError(f"a data hash of {len(data_hash)} characters is too short: give {MIN_HASH} or more.")
    every = [version for dataset in registry.datasets() for version in registry.versions(dataset)]
    known = sorted({version.lineage()["data_hash"] for version in every})
    meant = [one for one in known if one.startswith(data_hash)]
    if not meant:
        raise LookupError(f"no version was trained on data of hash {data_hash}. Known: {', '.join(known) or 'none'}.")
    if len(meant) > 1:
        raise ValueError(f"{data_hash} is the beginning of several data hashes: {', '.join(meant)}. Give more of it.")
    return meant[0], [version for version in every if version.lineage()["data_hash"] == meant[0]]


def _name(version: Version) -> str:
    return f"{version.name} version {version.version}"


def _dataset(version: Version) -> str:
    return version.name.removeprefix(tracking.registered_name(""))


def _roles(version: Version) -> list[str]:
    """Return the aliases of a version, and whether it is served."""
    roles = [alias for alias, number in registry.aliases(_dataset(version)).items() if number == version.version]
    tag = store.tag_of(version.lineage())
    return [*sorted(roles), *([f"served as {tag}"] if store.latest(version.name) == tag else [])]


def one_line(version: Version) -> str:
    """Say in a line what a version is, how good, and what it is for."""
    pair = version.tags.get("pair", "unknown pair")
    roles = _roles(version) or ["not served"]
    return f"{_name(version)}: {pair}, validation {version.recorded_nll:.2f} nats per image, {', '.join(roles)}"


def describe(version: Version) -> list[str]:
    """Return everything that is known of where a version comes from and what became of it, in lines."""
    training = registry.training_run(version)
    lineage, dataset = version.lineage(), _dataset(version)
    changed = {"true": ", with changes that were not committed", "false": ""}.get(training["tags"].get("git_dirty"), "")
    metrics = {name: value for name, value in training["metrics"].items() if not name.startswith("curve/")}
    lines = [
        one_line(version),
        f"data        MD5 {lineage['data_hash']} of {_data_file(version)}, protocol {version.tags.get('protocol')}",
        f"DVC         {_recorded_by_dvc(dataset, lineage['data_hash'])}",
        f"code        git commit {lineage['git_commit']}{changed}",
        f"weights     SHA-256 {lineage['weights_sha256']}",
        f"run         {version.run_id}, of {training['started']}, in {tracking.tracking_uri()}",
        "parameters",
        *(f"  {name} = {value}" for name, value in sorted(training["params"].items())),
        "metrics",
        *(f"  {name} = {value:g}" for name, value in sorted(metrics.items())),
        "decisions",
    ]
    decisions = [text for report in registry.decisions(dataset) if (text := _concerning(report, version.version))]
    return [*lines, *(f"  {text}" for text in decisions or ["none"])]


def _concerning(report: dict[str, Any], number: str) -> str | None:
    """Return a decision as a line if it concerns a version."""
    skipped = [f" (passed over: {one['reason']})" for one in report.get("skipped", []) if one["version"] == number]
    roles = [report.get(role) or {} for role in ("candidate", "champion", "runner_up", "rolled_back")]
    if not skipped and all(role.get("version") != number for role in roles):
        return None
    return history_line(report) + "".join(skipped)


def _data_file(version: Version) -> Path:
    return DATA_FOLDER / f"{_dataset(version)}.safetensors"


def _recorded_by_dvc(dataset: str, data_hash: str) -> str:
    """Say where dvc.lock records the data: in this folder, and since which git revision."""
    stage, now = f"prepare@{dataset}", recorded_hash(dataset)
    text = f"{stage} of dvc.lock in this folder records {'it' if now == data_hash else now or 'nothing'}"
    command = ["git", "log", "--reverse", "--format=%h of %cs", f"-S{data_hash}", "--", "dvc.lock"]
    try:
        revisions = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        revisions = []
    return f"{text}; {'first recorded in revision ' + revisions[0] if revisions else 'no git revision records it'}"


def verify(version: Version) -> tuple[list[str], list[str]]:
    """Compute again what the registry says of a version: checksums, and its score on the stated sample.

    Returns:
        What is as it was registered, in lines; and what is not, each with the reason.
    """
    checks: list[tuple[str, Callable[[Version], str]]] = [
        ("data", _verify_data),
        ("registry", _verify_registry),
        ("model store", _verify_store),
        ("score", _verify_score),
    ]
    found: list[str] = []
    failed: dict[str, list[str]] = {}  # reason -> what fails for it
    for name, check in checks:
        try:
            found.append(f"verified    {name}: {check(version)}")
        except Exception as error:
            if not is_for_user(error):
                raise
            failed.setdefault(" ".join(str(error).split()).rstrip("."), []).append(name)
    return found, [f"{' and '.join(names)}: {reason}" for reason, names in failed.items()]


def _verify_data(version: Version) -> str:
    data = _load_same(version)
    return f"the MD5 of {_data_file(version)} is {data.data_hash}"


def _load_same(version: Version) -> Dataset:
    data, expected = load_dataset(_data_file(version)), version.lineage()["data_hash"]
    if data.data_hash != expected:
        raise ValueError(f"the MD5 of {_data_file(version)} is {data.data_hash}, it was trained on {expected}")
    return data


def _verify_registry(version: Version) -> str:
    with tempfile.TemporaryDirectory() as folder:
        registry.download(version, Path(folder))
    return f"the weights' SHA-256 is {version.lineage()['weights_sha256']}"


def _verify_store(version: Version) -> str:
    lineage = version.lineage()
    tag, served = store.tag_of(lineage), store.latest(version.name)
    is_champion = registry.aliases(_dataset(version)).get(tracking.CHAMPION) == version.version
    again = f"Run python -m pipelines.steps promote {_dataset(version)}"
    if is_champion and served != tag:
        raise ValueError(f"{store.home()} serves {served or 'nothing'}, the champion is {tag}. {again}.")
    if not store.holds(tag):
        return f"{store.home()} does not hold it, and need not: it is not the champion"
    if not store.is_intact(tag, lineage["weights_sha256"]):
        raise ValueError(f"{tag} in {store.home()} does not hold the weights that were registered. {again}.")
    return f"{tag} has the same weights"


def _verify_score(version: Version) -> str:
    data = _load_same(version)
    with tempfile.TemporaryDirectory() as folder:
        model, scores = load_checkpoint(registry.download(version, Path(folder)))
    return f"the first {check_scores(_name(version), model, scores, data)} score what its training recorded"


def trace(version: str | None, data: str | None, again: bool) -> None:
    """Print the lineage that is asked for.

    Args:
        version: see `find_version`.
        data: see `find_data`.
        again: verify it, too.
    """
    if (version is None) == (data is None):
        raise ValueError("say one of the two: --version NAME/NUMBER (or a JSON file), or --data HASH.")
    if version is not None:
        found = [find_version(version)]
        print("\n".join(describe(found[0])))
    else:
        data_hash, found = find_data(str(data))
        print("\n".join([f"{data_hash}: trained on it, {len(found)} in all", *map(one_line, found)]))
    failures = []
    for one in found if again else []:
        lines, failed = verify(one)
        print("\n".join([f"{_name(one)}:", *lines]))
        failures += [f"{_name(one)}, {failure}" for failure in failed]
    if failures:
        raise ValueError(f"not as registered: {'; '.join(failures)}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.lineage", description="Where a served answer is from.")
    parser.add_argument("--version", help="NAME/NUMBER, or a JSON file: an answer of the service, or its `model`")
    parser.add_argument("--data", metavar="HASH", help="MD5 of a prepared file, or its beginning")
    parser.add_argument("--verify", action="store_true", help="compute checksums and a score again")
    arguments = parser.parse_args(argv)
    return run("lineage", lambda: trace(arguments.version, arguments.data, arguments.verify))


if __name__ == "__main__":
    sys.exit(main())
