"""Lineage: from a served answer to the bytes it came from, and forward again.

    python -m pipelines.registry.lineage --version pixelcnn-mnist/3   # or a JSON file: a served answer, or its `model`
    python -m pipelines.registry.lineage --data HASH                  # every version trained on it, and what is served

With `--verify` the checksums and a score are computed again.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Option, Typer

from pipelines.errors import reason_or_raise, run_typer
from pipelines.registry import decisions, store
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.registry.provenance import LOCK_FILES, prepared_file, recorded_hash
from pipelines.registry.versions import Version, check_scores
from pixelcnn.data import Dataset, load_dataset
from pixelcnn.evaluation import CHECKED_IMAGES

MIN_HASH = 6  # the shortest beginning of a data hash that is looked up

app = Typer(add_completion=False, rich_markup_mode=None)


def find_version(text: str) -> Version:
    """Return the version that `NAME/NUMBER` means, or a JSON file of an answer of the service or its `model`.

    ValueError if it is neither, or the file contradicts the registry; LookupError if that has no such version.
    """
    if not Path(text).is_file():
        name, _, number = text.rpartition("/")
        if not name or not number.isdigit():
            raise ValueError(f"{text!r} is neither a version, like pixelcnn-mnist/3, nor a JSON file of an answer.")
        return _registered(name, number)
    try:
        answer = json.loads(Path(text).read_text())
    except (ValueError, RecursionError):
        raise ValueError(f"{text} is no JSON. Save an answer of the service, or its `model`.") from None
    model = answer.get("model", answer) if isinstance(answer, dict) else None
    if not isinstance(model, dict) or not {"name", "version"} <= model.keys():
        raise ValueError(f"{text} names no model and version. Save an answer of the service, or its `model`.")
    if model["version"] == "released":  # it was served before a registry knew it
        known = registry.versions(str(model["name"]).removeprefix(tracking.registered_name("")))
        same = [one for one in known if one.identity == (model.get("weights_sha256"), model.get("data_hash"))]
        if not same:
            raise LookupError(
                f"{text} is an answer of released weights, which {tracking.location()} does not know. "
                "Register them first: python -m pipelines.steps release"
            )
        return same[0]
    version = _registered(str(model["name"]), str(model["version"]))
    for key, value in version.lineage().items():
        if str(model.get(key, value)) != value:
            raise ValueError(
                f"{text} says {key} {ascii(str(model[key]))[1:-1]}, but {version} has {value}: set MLFLOW_TRACKING_URI "
                "to the registry that it was served from."
            )
    return version


def _registered(name: str, number: str) -> Version:
    by_name = {tracking.registered_name(dataset): dataset for dataset in registry.datasets()}
    if name not in by_name:
        known = ", ".join(by_name) or "none"
        raise LookupError(f"no model {name!r} is registered in {tracking.location()}. Known: {known}.")
    versions = {version.version: version for version in registry.versions(by_name[name])}
    if number not in versions:
        raise LookupError(f"{name} has no version {ascii(number)[1:-1]}. Known: {', '.join(versions)}.")
    return versions[number]


def find_data(data_hash: str) -> tuple[str, list[Version]]:
    """Return the full hash, and every version trained on these data, by dataset and age.

    ValueError if the beginning that is given is too short, or that of several; LookupError if it is that of none.
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


def one_line(version: Version) -> str:
    """Say in a line what a version is, how good, and what it is for."""
    pair, tag = version.tags.get("pair", "unknown pair"), store.tag_of(version.lineage())
    aliases = registry.aliases(version.dataset).items()
    roles = sorted(alias for alias, number in aliases if number == version.version)
    roles += [f"served as {tag}"] if store.latest(version.name) == tag else []
    score = f"validation {version.recorded_nll:.2f} nats per image, protocol {version.tags.get('protocol', 'unknown')}"
    return f"{version}: {pair}, {score}, {', '.join(roles) or 'not served'}"


def describe(version: Version) -> list[str]:
    """Return everything that is known of where a version comes from and what became of it, in lines."""
    run = tracking.find_run(version.run_id)
    if run is None:
        raise LookupError(f"run {version.run_id} of {version} was deleted.")
    lineage, dataset = version.lineage(), version.dataset
    changed = ", with changes that were not committed" if run.data.tags.get("git_dirty") == "true" else ""
    metrics = {name: value for name, value in run.data.metrics.items() if not name.startswith("curve/")}
    every = decisions.decisions(dataset)
    concerning = [text for report in every if (text := _concerning(report, version))]
    return [
        one_line(version),
        f"data        MD5 {lineage['data_hash']} of {prepared_file(dataset)}, protocol {version.tags.get('protocol')}",
        f"DVC         {_recorded_by_dvc(dataset, lineage['data_hash'])}",
        f"code        git commit {lineage['git_commit']}{changed}",
        f"weights     SHA-256 {lineage['weights_sha256']}",
        f"run         {version.run_id}, of {registry.utc(run.info.start_time)}, in {tracking.location()}",
        "parameters",
        *(f"  {name} = {value}" for name, value in sorted(run.data.params.items())),
        "metrics",
        *(f"  {name} = {value:g}" for name, value in sorted(metrics.items())),
        "decisions",
        *(f"  {text}" for text in concerning or ["none"]),
    ]


def _concerning(report: dict[str, Any], version: Version) -> str | None:
    """Return a decision as a line if it concerns a version; a deleted model's numbers come again."""
    number, weights = version.version, version.lineage()["weights_sha256"]
    skipped = [f" (passed over: {one['reason']})" for one in report.get("skipped", []) if one["version"] == number]
    roles = [report.get(role) or {} for role in ("candidate", "champion", "rolled_back")]
    if not skipped and all((role.get("version"), role.get("weights_sha256")) != (number, weights) for role in roles):
        return None
    return decisions.history_line(report) + "".join(skipped)


def _recorded_by_dvc(dataset: str, data_hash: str) -> str:
    """Say where a dvc.lock records the data: in this folder, and since which git revision."""
    stage, now = f"prepare@{dataset}", recorded_hash(dataset)
    text = f"{stage} of dvc.lock in this folder records {'it' if now == data_hash else now or 'nothing'}"
    command = ["git", "log", "--reverse", "--format=%h of %cs", f"-S{data_hash}", "--", *LOCK_FILES]
    try:
        revisions = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        revisions = []
    return f"{text}; {'first recorded in revision ' + revisions[0] if revisions else 'no git revision records it'}"


def verify(version: Version) -> tuple[list[str], list[str]]:
    """Compute checksums and the stated score again; return what is as it was registered, and what is not, and why."""
    checks = {"data": _verify_data, "registry": _verify_registry, "model store": _verify_store, "score": _verify_score}
    found: list[str] = []
    failed: dict[str, list[str]] = {}  # reason -> what fails for it
    for name, check in checks.items():
        try:
            found.append(f"verified    {name}: {check(version)}")
        except Exception as error:
            failed.setdefault(reason_or_raise(error).rstrip("."), []).append(name)
    return found, [f"{' and '.join(names)}: {reason}" for reason, names in failed.items()]


def _verify_data(version: Version) -> str:
    return f"the MD5 of {prepared_file(version.dataset)} is {_load_same(version).data_hash}"


def _load_same(version: Version) -> Dataset:
    path, expected = prepared_file(version.dataset), version.lineage()["data_hash"]
    data = load_dataset(path)
    if data.data_hash != expected:
        raise ValueError(f"the MD5 of {path} is {data.data_hash}, it was trained on {expected}")
    return data


def _verify_registry(version: Version) -> str:
    with tempfile.TemporaryDirectory() as folder:
        registry.download(version, Path(folder))
    return f"the weights' SHA-256 is {version.lineage()['weights_sha256']}"


def _verify_store(version: Version) -> str:
    lineage = version.lineage()
    tag, served = store.tag_of(lineage), store.latest(version.name)
    is_champion = registry.aliases(version.dataset).get(tracking.CHAMPION) == version.version
    again = "Run python -m pipelines.steps repair"
    if is_champion and served != tag:
        raise ValueError(f"{store.home()} serves {served or 'nothing'}, the champion is {tag}. {again}.")
    if not store.folder_of(tag).is_dir():
        return f"{store.home()} does not hold it, and need not: it is not the champion"
    # Another one's description may be of a registry that was lost: it is exported again before it is served.
    if not store.is_intact(tag, lineage if is_champion else {"weights_sha256": lineage["weights_sha256"]}):
        raise ValueError(f"{tag} in {store.home()} does not hold the weights that were registered. {again}.")
    return f"{tag} has the same weights"


def _verify_score(version: Version) -> str:
    data = _load_same(version)
    check_scores(str(version), *registry.load(version), data)
    return f"up to {CHECKED_IMAGES} test images score what its training recorded"


@app.command()
def trace(
    version: Annotated[str | None, Option(help="NAME/NUMBER, or a JSON file: a served answer, or its `model`")] = None,
    data: Annotated[str | None, Option(metavar="HASH", help="MD5 of a prepared file, or its beginning")] = None,
    verify_again: Annotated[bool, Option("--verify", help="compute checksums and a score again")] = False,
) -> None:
    """Print where a served answer is from, or what became of data."""
    if (version is None) == (data is None):
        raise ValueError("say one of the two: --version NAME/NUMBER (or a JSON file), or --data HASH.")
    if version is not None:
        found = [find_version(version)]
        print("\n".join(describe(found[0])))
    else:
        data_hash, found = find_data(str(data))
        print("\n".join([f"{data_hash}: trained on it, {len(found)} in all", *map(one_line, found)]))
    failures = []
    for one in found if verify_again else []:
        lines, failed = verify(one)
        print("\n".join([f"{one}:", *lines]))
        failures += [f"{one}, {failure}" for failure in failed]
    if failures:
        raise ValueError(f"not as registered: {'; '.join(failures)}.")


def main(argv: Sequence[str] | None = None) -> int:
    return run_typer(app, "lineage", "python -m pipelines.registry.lineage", argv)


if __name__ == "__main__":
    sys.exit(main())
