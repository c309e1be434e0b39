"""Between environments: what one of them serves becomes the champion of another, by hash."""

import tempfile
from pathlib import Path

from pipelines.promotion.move import champion_lock, complete_moves, ensure_served, export, record_and_carry_out
from pipelines.promotion.reference import REFERENCE_FILE
from pipelines.promotion.register import register_checkpoint
from pipelines.registry import decisions, store
from pipelines.registry import versions as registry
from pipelines.registry.decisions import KEPT, PROMOTED, Report
from pipelines.registry.runs import CHAMPION, registered_name
from pipelines.settings import Settings, environment


def copy_served(dataset: str, to: str, why: str | None = None) -> Report:
    """Let another environment serve what this one serves: the same weights, measured on the same data.

    Args:
        to: the other environment's name.
        why: the reason to record there, beside who asked.

    Returns:
        The report, of a decision in the other registry.

    Raises:
        LookupError: the environment is unknown or this one, or nothing is served here; nothing has moved.
        ValueError: what is served here is damaged, or not what its scores say; nothing has moved.
    """
    here, tag = Settings().environment, store.latest(registered_name(dataset))
    if to == here:
        raise LookupError(f"this is {here} already: name another environment.")
    if tag is None:
        raise LookupError(f"{here} serves no model of {dataset}, so there is nothing to copy to {to}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = store.checkout(tag, Path(temporary) / "checkpoint")
        reference = store.file_of(tag, REFERENCE_FILE)
        source = {**store.metadata_of(tag), "environment": here}
        with environment(to), champion_lock(dataset):
            complete_moves(dataset)
            _, number, checked = register_checkpoint(folder)
            found = {version.version: version for version in registry.versions(dataset)}
            export(new := found[number], reference)
            champion = found.get(registry.aliases(dataset).get(CHAMPION, ""))
            what = f"the weights {new.tags['weights_sha256'][:12]}, served in {here} as version {source['version']}"
            report: Report = {"dataset": dataset, "data_hash": new.tags["data_hash"], "source": source}
            report |= {"decision": KEPT if new is champion else PROMOTED, "reason": f"copied: {what}", "new": None}
            with decisions.decision_run(dataset, "promotion", why) as run_id:
                if new is not champion:
                    report |= {"new": number, "old": champion and champion.version}
                    for role, version in (("candidate", new), ("champion", champion)):
                        report[role] = version and {**version.lineage(), "pair": version.tags["pair"]}
                    report["text"] = f"{dataset}: {what}, are version {number} and champion of {to} now ({checked})."
                    record_and_carry_out(dataset, run_id, report, new)
                else:
                    report["served"], done = ensure_served(new)
                    report["text"] = f"{dataset}: {to} has {what}, as its champion, version {number}, already."
                    report["text"] += f" Besides, {done}." if done else ""
                    decisions.record_decision(run_id, report)
                    decisions.end_decision(run_id)
    return report
