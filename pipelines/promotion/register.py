"""Checkpoints that exist already become versions: in `models/`, in `weights/`, in any folder, or served by a store.

Registered is what the checkpoint's `scores.json` says, once for the same weights and data. Where the prepared data are
there, the model is scored afresh on the images that its scores name, so that a wrong file cannot pass.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.datasets.entry import NAME, NAMES
from pipelines.errors import reason, reason_or_raise
from pipelines.params import load_params
from pipelines.promotion.move import champion_lock, ensure_served, export, record_and_carry_out
from pipelines.promotion.reference import REFERENCE_FILE
from pipelines.registry import decisions, store
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.registry.backup import follow_artifacts
from pipelines.registry.decisions import KEPT, PROMOTED, RELEASED, Report
from pipelines.registry.provenance import prepared_file
from pipelines.registry.versions import Version, check_scores
from pipelines.settings import DEVELOPMENT, Settings, environment, environments
from pipelines.stages import register as stage
from pipelines.stages.evaluate import MODELS_FOLDER, REPORTS_FOLDER
from pixelcnn.checkpoint import CONFIG_FILE
from pixelcnn.data import load_dataset
from pixelcnn.evaluation import CHECKED_IMAGES

WEIGHTS_FOLDER = Path("weights")


def register_checkpoint(folder: Path, released: bool = False) -> tuple[Version, str]:
    """Register a checkpoint; return its version, and what was checked.

    The same weights, measured on the same data, stay one version. ValueError if it is damaged, its scores do not say
    what it is, or it does not score what it says.
    """
    model, scores = stage.load_evaluated(folder)
    dataset, data_hash = scores["dataset"], scores["data_hash"]
    if not NAME.fullmatch(dataset):  # with an entry in params.yaml or not: a checkpoint says all that is needed
        raise ValueError(f"{folder} is of {dataset!r}, which is no name of a dataset: {NAMES}.")
    path, checked = prepared_file(dataset), "checksum checked, not scored: "
    if not path.exists():
        checked += "the prepared data are not here"
    elif (data := load_dataset(path)).data_hash != data_hash:
        checked += "the prepared data are others than those it was measured on"
    else:
        check_scores(str(folder), model, scores, data)
        checked = f"checksum checked, scored afresh on up to {CHECKED_IMAGES} test images"
    identity = tracking.identity(folder)
    if identity not in {version.identity for version in registry.versions(dataset)}:
        report = REPORTS_FOLDER / folder.name if folder.parent == MODELS_FOLDER else None
        stage.register(folder, report, released, scores=scores)
    return next(version for version in registry.versions(dataset) if version.identity == identity), checked


def register(text: str) -> str:
    """Register the checkpoint of a folder, or of a pair in `models/`; return what was done, in one sentence.

    Raises ValueError where neither holds one, and whatever `register_checkpoint` does.
    """
    folder = next((place for place in (Path(text), MODELS_FOLDER / text) if (place / CONFIG_FILE).is_file()), None)
    if folder is None:
        raise ValueError(
            f"neither {text} nor {MODELS_FOLDER / text} holds a checkpoint ({CONFIG_FILE}, weights and scores). Name a "
            "folder that does, fetch it (dvc pull), or train the pair."
        )
    version, checked = register_checkpoint(folder)
    return f"{folder} is version {version.version} of {version.name} ({checked})."


def register_trained(dataset: str) -> list[str]:
    """Register what lies in `models/` for the pairs of a dataset, after `dvc pull` say, or in a new registry.

    Return a sentence for each that is new, or that cannot be registered.
    """
    known = {version.identity for version in registry.versions(dataset)}
    done = []
    for name, pair in load_params().pairs.items():
        folder = MODELS_FOLDER / name
        if pair.dataset != dataset or not (folder / CONFIG_FILE).is_file():
            continue
        try:
            if tracking.identity(folder) not in known:
                version, checked = register_checkpoint(folder)
                done.append(f"{folder} is registered as version {version.version} ({checked}).")
        except ValueError as error:  # a damaged one does not keep out the others
            done.append(f"{folder} is not registered: {reason(error)}")
    return done


def repair(dataset: str, take_over: bool = False, why: str | None = None, first: Version | None = None) -> list[str]:
    """Let registry and model store say the same of a champion again, after either was lost; return what was done.

    A champion that is not served is exported again. Where the registry has none, what the store serves is registered
    and stays champion. What was decided and cut off is carried out first. Nothing is compared.

    Args:
        take_over: let this registry feed the store from now on, whichever did.
        first: becomes champion where neither has one.

    Raises:
        LookupError: another registry feeds the store.
        ValueError: the champion's files are damaged.
    """
    with champion_lock(dataset, take_over) as completed:
        done = [report["text"] for report in completed]
        served = store.latest(tracking.registered_name(dataset))
        if (champion := registry.champion(dataset)) is not None:
            what = ensure_served(champion)
            return [*done, f"{dataset}: {what}."] if what else done
        if served is not None:
            with tempfile.TemporaryDirectory() as folder:
                first, checked = register_checkpoint(store.checkout(served, Path(folder)))
            export(first, store.folder_of(served) / REFERENCE_FILE)
            cause = f"the registry had no champion, the store served {served}"
            became = f"it is version {first.version} and champion now ({checked})"
        elif first is not None:
            cause, became = "there was no champion", f"version {first.version} is champion now"
        else:
            return done
        report: Report = {"dataset": dataset, "decision": RELEASED, "reason": cause, "new": first.version, "old": None}
        report |= {"candidate": first.lineage(), "data_hash": first.tags["data_hash"]}
        report["text"] = f"{dataset}: {cause}; {became}."
        with decisions.decision_run(dataset, "release", why) as run_id:
            record_and_carry_out(run_id, report)
        return [*done, report["text"]]


def repair_all(take_over: bool = False, why: str | None = None) -> list[str]:
    """Repair each dataset that the registry or the store knows; return what was done, in sentences.

    With `take_over`, for which see `repair`, artifacts that were moved with the registry are found again, too.

    Raises:
        LookupError: another registry feeds the store.
        ValueError: at the end, naming what was done, and the datasets that could not be repaired.
    """
    served = [tag.partition(":")[0].removeprefix(tracking.registered_name("")) for tag in store.served()]
    done = follow_artifacts() if take_over else []
    failed: list[str] = []
    for dataset in sorted({*registry.datasets(), *served}):
        try:
            done += repair(dataset, take_over, why)
        except Exception as error:  # one damaged champion does not keep out the others
            if type(error) is LookupError:  # nor does another registry's store change
                raise LookupError(" ".join([*done, str(error)])) from None
            failed.append(f"{dataset} ({reason_or_raise(error)})")
    if failed:
        raise ValueError(" ".join([*done, f"These datasets could not be repaired: {'; '.join(failed)}."]))
    return done


def release_all(why: str | None = None) -> Iterator[str]:
    """Register every pair of `weights/`; yield one sentence for each, once it is done.

    The likeliest on its validation split comes first: it becomes champion where several pairs share a dataset.
    ValueError as `register_checkpoint`.
    """
    folders = sorted(folder for folder in WEIGHTS_FOLDER.glob("[!.]*") if (folder / CONFIG_FILE).exists())
    if not folders:
        raise LookupError(f"there are no released weights in {WEIGHTS_FOLDER.resolve()}: run this in a clone.")
    nats = {folder: stage.load_evaluated(folder)[1][registry.VALIDATION_METRIC] for folder in folders}
    for folder in sorted(folders, key=nats.__getitem__):
        yield release(folder.name, why)


def release(pair: str, why: str | None = None) -> str:
    """Register a pair's released weights; make them champion if their dataset has none; return what was done.

    They need no data for that: there is nothing to compare them with. From then on they compete like any version.
    """
    version, checked = register_checkpoint(WEIGHTS_FOLDER / pair, released=True)
    with champion_lock(version.dataset):  # what was cut off is carried out
        champion = registry.champion(version.dataset)
    if champion is None or champion.version == version.version:
        repair(version.dataset, why=why, first=version)
    became = "champion already." if champion is not None else "champion, as the first of its dataset."
    now = registry.champion(version.dataset)
    if now is not None and now.version != version.version:
        became = f"version {now.version} stays champion until a promotion decides otherwise."
    return f"{pair}: released weights are version {version.version} of {version.name} ({checked}); {became}"


def copy_served(dataset: str, to: str, why: str | None = None) -> Report:
    """Let another environment serve what this one serves, by weights and data; return the decision made there.

    Raises:
        LookupError: the environment is unknown or this one, or nothing is served here; nothing has moved.
        ValueError: what is served here is damaged, or not what its scores say; nothing has moved.
    """
    here, tag = Settings().environment, store.latest(tracking.registered_name(dataset))
    others = sorted({DEVELOPMENT, *environments()} - {here})
    if to not in others:
        raise LookupError(f"{to!r} is no other environment than this one, {here}. Known: {', '.join(others)}.")
    if tag is None:
        raise LookupError(f"{here} serves no model of {dataset}, so there is nothing to copy to {to}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = store.checkout(tag, Path(temporary))
        reference = store.folder_of(tag) / REFERENCE_FILE
        source = {**store.metadata_of(tag), "environment": here}
        with environment(to), champion_lock(dataset):
            new, checked = register_checkpoint(folder)
            export(new, reference)
            champion = registry.champion(dataset)
            what = f"the weights {new.tags['weights_sha256'][:12]}, served in {here} as version {source['version']}"
            report: Report = {"dataset": dataset, "data_hash": new.tags["data_hash"], "source": source}
            report |= {"old": champion and champion.version, "reason": f"copied: {what}"}
            if new.version == report["old"]:
                text = f"{dataset}: {to} has {what}, as its champion, version {new.version}, already."
                report |= {"decision": KEPT, "new": None, "text": text}
            else:
                for role, version in (("candidate", new), ("champion", champion)):
                    report[role] = version and {**version.lineage(), "pair": version.tags["pair"]}
                text = f"{dataset}: {what}, are version {new.version} and champion of {to} now ({checked})."
                report |= {"decision": PROMOTED, "new": new.version, "text": text}
            with decisions.decision_run(dataset, "promotion", why) as run_id:
                record_and_carry_out(run_id, report)
    return report
