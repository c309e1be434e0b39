"""Moves: a champion exported, recorded, put into its place and served; taken back; completed after a kill.

The order of writes. A new champion is exported to the model store, the decision is recorded, and only then the aliases
move and the model is served: whenever a run is cut off, what is served is whole, and the next promotion or rollback
first completes what was decided. A version that was rolled back is passed over from then on; a rollback to it, or a
promotion that names it, brings it back.

A model store is fed by one registry, whose identity it keeps: no experiment and no second clone moves what it serves.

Two at once. On one machine the second waits for the first and then decides on what that has left. Between machines, a
promotion that finds another champion than the one it compared with decides again.
"""

import logging
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pipelines.errors import reason, reason_or_raise, tool_of
from pipelines.files import file_lock
from pipelines.params import PromoteParams
from pipelines.promotion.decide import Decision, Scorer
from pipelines.promotion.reference import REFERENCE_FILE, write_reference
from pipelines.promotion.score import score
from pipelines.registry import decisions, store
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.registry.decisions import ROLLED_BACK, Report
from pipelines.registry.runs import CHALLENGER, CHAMPION, PREVIOUS, find_run, is_shared, location, registered_name
from pipelines.registry.versions import Version
from pipelines.settings import Settings
from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.data import Dataset

MAX_DECISIONS = 3  # of one promotion, while other machines move the champion

logger = logging.getLogger(__name__)


class UnfinishedMoveError(OSError):
    """A recorded decision was carried out in part; the text says how far, and that the next run completes it."""


def explained(error: Exception) -> str:
    """Return the reason of an error as `reason_or_raise` does, and which server or store it concerns if it is one's."""
    why, tool = reason_or_raise(error), tool_of(error)
    if tool not in ("bentoml", "mlflow", "requests", "sqlalchemy"):
        return why
    places = {"bentoml": f"the model store in {store.home()}", "sqlalchemy": f"MLflow's database {location()}"}
    return f"{places.get(tool, f'MLflow at {location()}')} failed ({why}). Run this again once it works."


def export(version: Version, reference: Path | None = None) -> str:
    """Put a version into the model store, not yet served; return its tag.

    One that is there, whole, stays, and gets the reference of its drawings if it has none and there is one now: a file
    in another store, or else made of the data, if they are here.
    """
    lineage, dataset = version.lineage(), version.tags["dataset"]  # the tag: a version of MLflow's own pages has none
    tag = store.tag_of(lineage)
    is_there = store.is_intact(tag, lineage)
    if not (is_there and (store.folder_of(tag) / REFERENCE_FILE).exists()):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            checkpoint = store.checkout(tag, folder) if is_there else registry.download(version, folder)
            has_reference = write_reference(checkpoint, dataset, lineage["data_hash"], reference)
            if has_reference or not is_there:
                _, scores = load_checkpoint(checkpoint)
                more = {
                    "dataset": dataset,
                    "label_names": list(scores["label_names"]),
                    "protocol": version.tags["protocol"],
                    "promoted_at": store.metadata_of(tag)["promoted_at"] if is_there else _now(),
                }
                store.export(checkpoint, {**lineage, **more})
        if not (is_there or has_reference):
            logger.warning(
                "the data of %s that %s was trained on are not here: its drawings will not be watched for drift until "
                "they are, and `python -m pipelines.steps repair` has run",
                *(dataset, tag),
            )
    store.set_feeder(check_feeder())  # again: another registry may feed the store since, for a decision takes minutes
    return tag


def _this_registry() -> dict[str, str]:
    this = {"registry": decisions.registry_id(), "at": location(), "host": socket.gethostname()}
    if (database := tracking.sqlite_file()) is not None:
        status = database.stat()
        this["file"] = f"{status.st_dev}:{status.st_ino}"  # which a move within a disk keeps, and a copy does not
    return this


def check_feeder() -> dict[str, str]:
    """Return this registry, as `store.set_feeder` takes it; LookupError unless it may feed the model store.

    A store that serves nothing yet is anybody's. A registry whose file was renamed feeds its store as before, and so
    does one that was lost and begun anew in the same place. Any other place is taken for that of a copy, whether or not
    the one that feeds the store can be seen from here.
    """
    if experiment := Settings().experiment:
        raise LookupError(
            f"this is a DVC experiment (on {experiment[:12]}), which registers and compares, and moves no champion: "
            "nothing moved. Promote what it made once it is applied: dvc exp apply NAME."
        )
    this, known, whose = _this_registry(), store.feeder(), ""
    if known is None:
        for tag in store.served():
            try:
                run_id = str(store.metadata_of(tag).get("run_id"))
            except (ValueError, OSError):  # damaged, as by a power cut: it tells of no registry
                continue
            if find_run(run_id) is None:
                whose = f"serves {tag}, which this registry does not know"
    elif (known["at"], known["host"]) == (this["at"], this["host"]):
        pass  # this registry, or one that was lost and begun anew
    elif known["registry"] != this["registry"]:
        whose = f"is fed by another registry, {known['at']} on {known['host']}"
    else:
        same_file = known["host"] == this["host"] and known.get("file") == this.get("file", "")
        is_renamed = same_file and not Path(known["at"]).exists()
        if not is_renamed and not (known["at"] == this["at"] and is_shared()):
            whose = f"is fed by {known['at']} on {known['host']}, of which this registry is a copy"
    if whose:
        raise LookupError(
            f"the model store {store.home()} {whose}, and this is {this['at']} on {this['host']}: nothing moved. Set "
            "BENTOML_HOME to a store of this registry, or MLFLOW_TRACKING_URI to that one. If that one is lost, or was "
            "moved here, let this one take over what is served: python -m pipelines.steps repair --take-over."
        )
    return this


def ensure_served(version: Version) -> str:
    """Let the model store serve a version, whole; return what there was to do for that, in words, or none."""
    tag = store.tag_of(version.lineage())
    reference, was_whole = store.folder_of(tag) / REFERENCE_FILE, store.is_intact(tag, version.lineage())
    had_reference = reference.exists()
    export(version)
    if store.latest(version.name) != tag:
        store.serve(tag)
        return f"the model store serves {tag} again"
    if not was_whole:
        return f"{tag}, which was damaged, is exported to the model store again"
    return f"{tag} has a reference of its drawings now" if reference.exists() and not had_reference else ""


def record_and_carry_out(run_id: str, report: Report) -> None:
    """Record a decision, and make its moves; before the record, nothing has moved.

    One that moves nothing lets the store serve the champion, and says so if it did not before.
    """
    report["decision_run_id"] = run_id
    found = {version.version: version for version in registry.versions(report["dataset"])}
    served = report["new"] or report["old"]
    if served is not None and served not in found:
        raise LookupError(
            f"version {served} of {report['dataset']} was removed from MLflow meanwhile: nothing new moved. Run this "
            "again."
        )
    if report["new"] is not None:
        report["served"] = export(found[report["new"]])
        decisions.begin_moves(run_id, report)
        _carry_out(run_id, report, found)
        return
    if report["old"] is not None:
        champion = found[report["old"]]
        try:
            done = ensure_served(champion)
            report["text"] += f" Besides, {done}." if done else ""
        except ValueError as error:  # its own files are damaged: what is served stays, as does everything else
            report["text"] += f" The model store was left as it is: {reason(error)}"
        report["served"] = store.latest(champion.name)
    decisions.record_decision(run_id, report)
    decisions.end_decision(run_id)


def _carry_out(run_id: str, report: Report, found: dict[str, Version]) -> None:
    """Make the moves of a recorded decision, or raise UnfinishedMoveError; those that were made stay as they are."""
    dataset, new, old = report["dataset"], found[report["new"]], found.get(report.get("old") or "")
    tag = store.tag_of(new.lineage())
    marked = [found[number] for number in report.get("passed_over", []) if number in found]
    serve = (f"{tag} is served", lambda: store.serve(tag))
    moves: list[tuple[str, Callable[[], object]]] = [
        (f"{tag} is in the model store", lambda: export(new)),
        *((f"version {v.version} is marked", lambda v=v: registry.mark_rolled_back(v, _now())) for v in marked),
        (f"version {new.version} is not marked as rolled back", lambda: registry.unmark_rolled_back(new)),
    ]
    if report["decision"] == ROLLED_BACK:  # whoever asks for that wants it served first of all
        moves.append(serve)
    if old is not None:
        moves.append((f"previous is version {old.version}", lambda: registry.set_alias(dataset, PREVIOUS, old.version)))
    moves += [
        (f"champion is version {new.version}", lambda: registry.set_alias(dataset, CHAMPION, new.version)),
        ("the new champion is no challenger", lambda: registry.remove_alias(dataset, CHALLENGER, new.version)),
        serve,
    ]
    if old is not None and store.latest(new.name, "challenger") == store.tag_of(old.lineage()):
        # Its challenge ended when it became champion, and is not to begin again now that it is none.
        moves.append(("the champion has no challenger", lambda: store.serve(tag, "challenger")))
    moves.append(("the record says that it is done", lambda: decisions.end_decision(run_id)))
    done: list[str] = []
    for what, move in moves:
        try:
            move()
        except Exception as error:
            raise UnfinishedMoveError(
                f"it was decided that version {new.version} is the champion, and that is carried out in part. Done: "
                f"{', '.join(done) or 'nothing'}. Failed: {what} ({explained(error)}). Run this again to go on there."
            ) from error
        done.append(what)


def _is_of(report: Report, found: dict[str, Version]) -> bool:
    """Say whether a decision's champion is not another one of these versions: a deleted model's numbers come again."""
    made = report.get("champion" if report["decision"] == ROLLED_BACK else "candidate") or {}
    new = found.get(report.get("new", ""))
    return new is None or made.get("weights_sha256") in (None, new.lineage()["weights_sha256"])  # None: it was lost


def _complete_moves(dataset: str) -> list[Report]:
    """Carry out each decision that was cut off; one that another has overtaken is left, and shown as failed."""
    done = []
    for run_id, report in decisions.unfinished_decisions(dataset):
        found = {version.version: version for version in registry.versions(dataset)}
        champion = registry.aliases(dataset).get(CHAMPION)
        if (
            report is None
            or report["new"] not in found
            or not _is_of(report, found)
            or champion not in (report["new"], report["old"])
        ):
            decisions.end_decision(run_id, "FAILED")
            continue
        _carry_out(run_id, report, found)
        done.append({**report, "text": f"{dataset}: a decision that was cut off is carried out: {report['text']}"})
    return done


@contextmanager
def champion_lock(dataset: str, take_over: bool = False) -> Iterator[list[Report]]:
    """Hold the lock of a dataset's champion, in a store that this registry feeds (`check_feeder`), or takes over.

    What processes that were killed had decided, and not carried out, is carried out first; yield the reports of that.
    """
    lock = store.home() / f".{registered_name(dataset)}.lock"
    with file_lock(lock, f"the decision about {dataset}", lambda text: print(text, file=sys.stderr)):
        if take_over:
            store.set_feeder(_this_registry())
        else:
            check_feeder()
        yield _complete_moves(dataset)


def run_promotion(
    dataset: str,
    data: Dataset,
    params: PromoteParams,
    scorer: Scorer = score,
    dry_run: bool = False,
    only: int | None = None,
    why: str | None = None,
) -> Report:
    """Decide, record the decision, and move; complete first what an earlier process was killed at.

    `data`, `scorer` and `only` are those of `Decision`. A `dry_run` decides; it moves, exports and records nothing.

    Raises:
        LookupError: nothing is registered, or no such version, or another registry feeds the store.
        UnfinishedMoveError: it was decided, and carried out in part.
        Exception: whatever else; nothing but what was cut off has moved.
    """
    numbers = [version.version for version in registry.versions(dataset)]
    if not numbers:
        raise LookupError(
            f"no version of {registered_name(dataset)} is registered: train a pair of {dataset} first, or register a "
            "checkpoint: python -m pipelines.steps register FOLDER."
        )
    if only is not None and str(only) not in numbers:
        raise LookupError(f"{registered_name(dataset)} has no version {only}. Known: {', '.join(numbers)}.")
    if dry_run:
        return Decision(dataset, data, params, only, scorer, dry_run).report
    with champion_lock(dataset) as completed, decisions.decision_run(dataset, "promotion", why) as run_id:
        for _ in range(MAX_DECISIONS):
            report = Decision(dataset, data, params, only, scorer, dry_run).report
            if registry.aliases(dataset).get(CHAMPION) == report["old"]:
                break
        else:
            raise OSError(
                f"the champion of {dataset} changed {MAX_DECISIONS} times during the decision: other machines "
                "promote, too. Run this again."
            )
        report["text"] = " ".join([*(one["text"] for one in completed), report["text"]])
        record_and_carry_out(run_id, report)
    return report


def run_rollback(dataset: str, to: int | None = None, why: str | None = None) -> Report:
    """Make an earlier champion the champion again, and serve it; the present one becomes `previous`.

    All that were champion since are passed over by promotions from then on, and by rollbacks: a second one goes further
    back. A rollback that was cut off is completed, and no second one is made unless it is to another version. `to` is a
    version that was champion; None for the one before the present champion.

    Raises:
        LookupError: there is none, or another registry feeds the store; nothing but what was cut off has moved.
        ValueError: the version cannot be fetched whole; nothing but what was cut off has moved.
        UnfinishedMoveError: it was carried out in part.
    """
    with champion_lock(dataset) as completed:
        told = "".join(f"{one['text']} " for one in completed)
        for one in completed:
            if one["decision"] == ROLLED_BACK and to in (None, int(one["new"])):
                return {**one, "text": told.strip()}
        found = {version.version: version for version in registry.versions(dataset)}
        present = registry.aliases(dataset).get(CHAMPION, "")
        champion = found.get(present)
        made = [report for report in decisions.decisions(dataset) if _is_of(report, found)]
        past = [report["new"] for report in made if report.get("new")]
        earlier = [number for number in dict.fromkeys(past) if number in found and number != present]
        if champion is None and earlier:
            raise LookupError(
                f"{registered_name(dataset)} has no champion to roll back from, for its alias or version was removed: "
                "nothing moved. Make what is served the champion again, and roll back then: python -m pipelines.steps "
                "repair."
            )
        before = [number for number in decisions.champions(made) if number in earlier]
        number = str(to) if to is not None else next(reversed(before), "")
        if champion is None or number not in earlier:
            wanted = "no previous champion" if to is None else f"no earlier champion of version {to}"
            raise LookupError(
                f"{registered_name(dataset)} has {wanted} to roll back to: {told or 'nothing moved. '}Earlier "
                f"champions: {', '.join(earlier) or 'none'}." + (" Name one: --to N." if earlier and to is None else "")
            )
        target = found[number]
        since = past[len(past) - past[::-1].index(number) :]
        report: Report = {
            "dataset": dataset,
            "decision": ROLLED_BACK,
            "reason": f"asked for: from version {champion.version} back to version {target.version}",
            "new": target.version,
            "old": champion.version,
            "champion": target.lineage(),
            "rolled_back": champion.lineage(),
            "passed_over": sorted({champion.version, *since} - {target.version}, key=int),
            "text": f"{told}{dataset}: version {target.version} is the champion again and "
            f"{store.tag_of(target.lineage())} is served; version {champion.version} is now `previous` and is not "
            "promoted again by itself.",
        }
        with decisions.decision_run(dataset, "rollback", why) as run_id:
            record_and_carry_out(run_id, report)
    return report


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_shadow(dataset: str, number: int | None = None) -> str:
    """Let a version score the drawings that the champion completes, beside it; return what was done, in a sentence.

    It is version `number`, the champion to end it; None for the alias `challenger`.

    Raises:
        LookupError: there is no such version; nothing has changed.
        ValueError: it is for other images or labels than the champion; no challenge has begun.
    """
    wanted = str(number) if number is not None else registry.aliases(dataset).get(CHALLENGER, "")
    found = {version.version: version for version in registry.versions(dataset)}
    if wanted not in found:
        asked, known = f"version {wanted}" if wanted else "challenger", ", ".join(found) or "none"
        raise LookupError(f"{registered_name(dataset)} has no {asked}: name one, --version N. Known: {known}.")
    version = found[wanted]
    with champion_lock(dataset):
        tag, served = export(version), store.latest(version.name)
        own, of_served = (load_checkpoint(store.folder_of(one))[0].config for one in (tag, served or tag))
        if not own.for_same_images(of_served):
            raise ValueError(
                f"{tag} is for other images or labels than {served}, which is served: no challenge has begun. Name a "
                "version that was trained on the same data: --version N."
            )
        store.serve(tag, "challenger")
    if registry.aliases(dataset).get(CHAMPION) == version.version:
        return f"{tag} is the champion of {dataset}: no other version scores its drawings from now on."
    return f"{tag} scores the drawings of {dataset}, beside the champion: GET /drawings of the service tells of both."
