"""The promotion flow: the best candidate takes the champion's place if the evidence says so; and the way back.

The rule. Candidates are the registered versions that were measured on the current prepared data and pass the checks of
candidate_checks.py: none that gives no numbers, looks ahead, or samples too slowly. The best one (by its recorded
validation NLL) and the champion are scored afresh, without label, on the same validation images. The candidate becomes
champion only if the confidence interval of the mean per-image difference in NLL, candidate minus champion, lies wholly
below zero; or if it has a context network, completes better by the same test (the mean over the masks of
`observed.SCORED`), and its interval as a joint model lies below JOINT_ALLOWANCE: what completion may cost. In every
other case nothing moves and the report says why. Where there is no champion yet, the better of the two best candidates
takes the place if it beats the uniform distribution.

The order of writes. A new champion is exported to the model store, the decision is recorded, and only then the aliases
move and the model is served: whenever a run is cut off, what is served is whole, and the next promotion or rollback
first completes what was decided. A version that was rolled back is passed over from then on; a second rollback brings
it back.

Two at once. On one machine the second waits for the first and then decides on what that has left. Between machines, a
promotion that finds another champion than the one it compared with decides again.
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from pipelines import registry, store
from pipelines.candidate_checks import check_candidate
from pipelines.files import alone, write_whole
from pipelines.params import PromoteParams, check_dataset, load_params
from pipelines.registry import Version
from pipelines.tracking import CHALLENGER, CHAMPION, PREVIOUS, registered_name, tracking_uri
from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.data import Dataset, load_dataset
from pixelcnn.evaluation import format_nll, per_image_completion_nll, per_image_nll
from pixelcnn.likelihood import bits_per_dim
from pixelcnn.model import AutoregressiveModel
from pixelcnn.observed import SCORED

DATA_FOLDER = Path("data")
REPORTS_FOLDER = Path("reports/promotions")

PROMOTED, KEPT, FAILED, ROLLED_BACK = "promoted", "kept", "failed", "rolled back"
MAX_DECISIONS = 3  # of one promotion, while other machines move the champion
RELEASED = "released"  # by pipelines/release.py

JOINT_ALLOWANCE = {True: 0.3, False: 0.01}  # nats of a binary image; bits per dimension of others
NUM_COMPLETED = 1000  # validation images that completion is scored on

Report = dict[str, Any]
Scorer = Callable[[Version, Dataset, int, float | None], torch.Tensor]


def _fetch(version: Version) -> AutoregressiveModel:
    with tempfile.TemporaryDirectory() as folder:
        return load_checkpoint(registry.download(version, Path(folder)))[0]


def score(version: Version, data: Dataset, batch_size: int, max_sample_s: float | None = None) -> torch.Tensor:
    """Fetch a version and score it on the validation split.

    Args:
        max_sample_s: of a candidate, which is checked before it is scored; None for a champion, which is not.

    Returns:
        (N,) float64, nats per image.

    Raises:
        ValueError: it cannot be fetched or loaded, does not fit the data, fails the checks, or a score is not a finite
            number.
    """
    model = _fetch(version)
    if (model.config.image_shape, model.config.num_levels) != (data.image_shape, data.num_levels):
        raise ValueError(
            f"it is for images {model.config.image_shape} of {model.config.num_levels} levels, "
            f"{data.name} has {data.image_shape} of {data.num_levels}."
        )
    if max_sample_s is not None:
        check_candidate(model, data.levels("validation", slice(0, 1))[0], max_sample_s)
    nll = per_image_nll(model, data, "validation", batch_size=batch_size)
    if not bool(nll.isfinite().all()):
        raise ValueError(f"its NLL is not a finite number for {int((~nll.isfinite()).sum())} of {len(nll)} images.")
    return nll


def completion_score(version: Version, data: Dataset, batch_size: int) -> tuple[torch.Tensor, bool]:
    """Fetch a version and score how it completes the first validation images.

    Returns:
        (N,) float64, nats per image of what is missing, the mean over the scored masks; and whether it has a context
        network: without one that of raster clamping.

    Raises:
        ValueError: it cannot be fetched or loaded, or a score is not a finite number.
    """
    model = _fetch(version)
    by_mask = per_image_completion_nll(model, data, "validation", NUM_COMPLETED, batch_size)
    nll = torch.stack([by_mask[mask] for mask in SCORED]).mean(dim=0)
    if not bool(nll.isfinite().all()):
        raise ValueError(f"its completion NLL is not a finite number for {int((~nll.isfinite()).sum())} images.")
    return nll, bool(model.config.context_features)


def paired_difference(candidate: torch.Tensor, champion: torch.Tensor, confidence: float) -> dict[str, float] | None:
    """Return mean and confidence interval of candidate minus champion, (N,) NLLs each of the same images.

    The interval is the normal one, mean -/+ z * standard error; None for fewer than two images.
    """
    difference = candidate - champion
    if len(difference) < 2:
        return None
    mean = difference.mean().item()
    half = NormalDist().inv_cdf((1 + confidence) / 2) * difference.std().item() / math.sqrt(len(difference))
    return {"mean": mean, "low": mean - half, "high": mean + half, "num_images": len(difference)}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _unreachable(error: Exception) -> str:
    return (
        f"MLflow at {tracking_uri()} or the model store in {store.home()} cannot be used ({_reason(error)[:120]}). "
        "Run this again once they can."
    )


class _Decision:
    """One decision under way: the report that it fills, and the moves that it makes."""

    def __init__(self, dataset: str, data: Dataset, params: PromoteParams, scorer: Scorer) -> None:
        self.dataset, self.data, self.params, self.scorer = dataset, data, params, scorer
        self.report: Report = {
            "dataset": dataset,
            "data_hash": data.data_hash,
            "protocol": data.protocol,
            "decision": KEPT,
            "reason": "",
            "champion": None,
            "candidate": None,
            "runner_up": None,
            "difference": None,
            "completion_difference": None,
            "confidence": params.confidence,
            "skipped": [],
            "new": None,
            "old": None,
            "served": None,
        }

    def kept(self, reason: str) -> None:
        self.report["decision"], self.report["reason"] = KEPT, reason

    def describe(self, version: Version, nll: torch.Tensor | None = None) -> dict[str, Any]:
        pair = version.tags.get("pair", "unknown")
        return {**version.lineage(), "pair": pair, "nll_nats": None if nll is None else nll.mean().item()}

    def skip(self, version: Version, reason: str) -> None:
        self.report["skipped"].append({"version": version.version, "reason": reason})

    def candidates(self, found: list[Version], champion: Version | None) -> list[Version]:
        """Return who may compete, the best first; say of each other one why not."""
        able = []
        for version in found:
            if champion is not None and version.version == champion.version:
                continue
            data_hash = version.tags.get("data_hash", "")
            if data_hash != self.data.data_hash:
                now = self.data.data_hash[:12]
                self.skip(version, f"it was measured on other data (hash {data_hash[:12] or 'unknown'}, now {now})")
            elif version.rolled_back:
                self.skip(version, "it was rolled back; a second rollback would bring it back")
            elif not math.isfinite(version.recorded_nll):
                self.skip(version, "its recorded validation NLL is not a finite number")
            else:
                able.append(version)
        return sorted(able, key=lambda v: (v.recorded_nll, int(v.version)))

    def scored(self, candidates: list[Version], num: int) -> list[tuple[Version, torch.Tensor]]:
        """Return the first candidates that can be scored, `num` at most, with their scores; the best first."""
        scored: list[tuple[Version, torch.Tensor]] = []
        for version in candidates:
            if len(scored) == num:
                break
            try:
                nll = self.scorer(version, self.data, self.params.batch_size, self.params.max_sample_s)
                scored.append((version, nll))
            except Exception as error:  # whatever is wrong with one candidate, the next may be fine
                self.skip(version, _reason(error))
        return sorted(scored, key=lambda one: one[1].mean().item())

    def decide(self, found: list[Version], champion: Version | None) -> Version | None:
        """Fill the report; return the version that is to become champion, or None."""
        candidates = self.candidates(found, champion)
        if champion is None:
            return self._first(self.scored(candidates, 2))
        self.report["champion"] = self.describe(champion)
        if not candidates:
            self.kept(f"no other version can compete{self._why_skipped()}")
            return None
        try:
            champion_nll = self.scorer(champion, self.data, self.params.batch_size, None)
        except Exception as error:  # without the champion's score there is no evidence, whatever the cause
            self.kept(f"champion version {champion.version} cannot be scored: {_reason(error)}")
            return None
        self.report["champion"] = self.describe(champion, champion_nll)
        best = self.scored(candidates, 1)
        if not best:
            self.kept(f"no other version can be scored{self._why_skipped()}")
            return None
        version, nll = best[0]
        self.report["candidate"] = self.describe(version, nll)
        difference = paired_difference(nll, champion_nll, self.params.confidence)
        self.report["difference"] = difference
        if difference is None:
            self.kept("one validation image gives no interval")
            return None
        interval = self._interval(difference, "champion")
        if difference["high"] < 0:
            self.report["decision"], self.report["reason"] = PROMOTED, f"{interval} lies below zero"
            return version
        completes = self._completes_better(version, champion, difference)
        if completes:
            self.report["decision"], self.report["reason"] = PROMOTED, f"{interval} allows it; {completes}"
            return version
        self.kept(f"{interval} is not wholly below zero")
        return None

    def _completes_better(self, version: Version, champion: Version, difference: dict[str, float]) -> str:
        """Return how much better a candidate completes, if it may cost what it does; else nothing."""
        high = difference["high"]
        binary = self.data.num_levels == 2
        if (high if binary else bits_per_dim(high, self.data.image_shape)) > JOINT_ALLOWANCE[binary]:
            return ""
        try:
            nll, has_context = completion_score(version, self.data, self.params.batch_size)
            if not has_context:
                return ""
            champion_nll, _ = completion_score(champion, self.data, self.params.batch_size)
        except Exception as error:  # without both scores there is no evidence, whatever the cause
            self.skip(version, f"its completion cannot be compared ({_reason(error)})")
            return ""
        found = paired_difference(nll, champion_nll, self.params.confidence)
        self.report["completion_difference"] = found
        if found is None or not found["high"] < 0:
            return ""
        return f"of its completions it is [{found['low']:.3f}, {found['high']:.3f}] nats, below zero"

    def _interval(self, difference: dict[str, float], rival: str) -> str:
        low, high = difference["low"], difference["high"]
        return (
            f"the {100 * self.params.confidence:g} % interval of candidate minus {rival}, [{low:.3f}, {high:.3f}] nats,"
        )

    def _first(self, scored: list[tuple[Version, torch.Tensor]]) -> Version | None:
        """Choose the first champion from the best and the runner-up, whose scores go into the report."""
        if not scored:
            self.kept(f"there is no champion and no version can become it{self._why_skipped()}")
            return None
        version, nll = scored[0]
        self.report["candidate"] = self.describe(version, nll)
        uniform = math.prod(self.data.image_shape) * math.log(self.data.num_levels)
        if not nll.mean().item() < uniform:
            self.kept(
                f"the best version is no better than the uniform distribution ({self._format(nll.mean().item())} "
                f"against {self._format(uniform)})"
            )
            return None
        reason = f"there was no champion and it beats the uniform distribution, {self._format(uniform)}"
        if len(scored) > 1:
            runner_up, runner_up_nll = scored[1]
            self.report["runner_up"] = self.describe(runner_up, runner_up_nll)
            self.report["difference"] = paired_difference(nll, runner_up_nll, self.params.confidence)
            if self.report["difference"] is not None:
                reason += f"; {self._interval(self.report['difference'], 'runner-up').removesuffix(',')}"
        self.report["decision"], self.report["reason"] = PROMOTED, reason
        return version

    def _why_skipped(self, before: str = " (", after: str = ")") -> str:
        skipped = [f"version {s['version']}: {s['reason'].rstrip('.')}" for s in self.report["skipped"]]
        return f"{before}{'; '.join(skipped)}{after}" if skipped else ""

    def _format(self, nats: float) -> str:
        return format_nll(nats, self.data.image_shape, self.data.num_levels)

    def text(self, dry_run: bool = False) -> str:
        """Return the decision in a sentence or two."""
        report = self.report
        head = (
            f"{'dry run: ' if dry_run else ''}{self.dataset} ({self.data.protocol}, data {self.data.data_hash[:12]}): "
        )
        scores = [
            f"{name} version {scored['version']} ({scored['pair']}) {self._format(scored['nll_nats'])}"
            for role, name in (("candidate", "candidate"), ("runner_up", "runner-up"), ("champion", "champion"))
            if (scored := report[role]) and scored["nll_nats"] is not None
        ]
        measured = f" Validation: {', '.join(scores)}." if scores else ""
        if scores:
            measured += self._why_skipped(" Passed over: ", ".")
        if report["decision"] == PROMOTED:
            verb = "would be" if dry_run else "is"
            new = report["candidate"]["version"]
            return f"{head}version {new} {verb} the new champion: {report['reason']}.{measured}"
        return f"{head}nothing {'would move' if dry_run else 'moved'}: {report['reason'].rstrip('.')}.{measured}"


def _metadata(version: Version, data_names: tuple[str, ...]) -> dict[str, Any]:
    return {
        **version.lineage(),
        "dataset": version.tags["dataset"],
        "label_names": list(data_names),
        "protocol": version.tags["protocol"],
        "promoted_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def export(version: Version) -> str:
    """Put a version into the model store, not yet served; return its tag. One that is there, whole, stays."""
    tag = store.tag_of(version.lineage())
    if store.is_intact(tag, version.tags["weights_sha256"]):
        return tag
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = registry.download(version, Path(folder))
        _, scores = load_checkpoint(checkpoint)
        return store.export(checkpoint, _metadata(version, tuple(scores["label_names"])))


def ensure_served(version: Version) -> tuple[str, bool]:
    """Let the model store serve a version, if a run was cut off or the store is a new one; else do nothing.

    Returns:
        The version's tag, and whether anything was to be done.
    """
    tag = export(version)
    if store.latest(version.name) == tag:
        return tag, False
    store.serve(tag)
    return tag, True


def run_promotion(
    dataset: str, data: Dataset, params: PromoteParams, scorer: Scorer = score, dry_run: bool = False
) -> Report:
    """Decide, record the decision, and move; complete first what an earlier process was killed at.

    Args:
        data: the current prepared data.
        scorer: like `score`.
        dry_run: decide only; nothing is moved, exported or recorded.

    Returns:
        The report; its `decision` is `promoted` or `kept`, its `text` says it in words.

    Raises:
        Exception: the registry or the model store cannot be reached; nothing has moved that a second run would not
            complete.
    """
    found = registry.versions(dataset)
    if not found:
        raise LookupError(
            f"no version of {registered_name(dataset)} is registered: train a pair of {dataset} first, "
            f"dvc repro promote@{dataset}."
        )
    if dry_run:
        decision = _Decision(dataset, data, params, scorer)
        decision.decide(found, champion_of(dataset, found))
        decision.report["text"] = decision.text(dry_run=True)
        return decision.report
    with alone_with(dataset):
        completed = complete_moves(dataset)
        with registry.decision_run(dataset, "promotion") as run_id:
            for _ in range(MAX_DECISIONS):
                found = registry.versions(dataset)
                champion = champion_of(dataset, found)
                decision = _Decision(dataset, data, params, scorer)
                chosen = decision.decide(found, champion)
                report = decision.report | {"decision_run_id": run_id}
                if registry.aliases(dataset).get(CHAMPION) == (champion.version if champion else None):
                    break
            else:
                raise OSError(f"the champion of {dataset} changed {MAX_DECISIONS} times while it was decided")
            report["text"] = "".join(f"{text} " for text in completed) + decision.text()
            if chosen is not None:
                report["served"] = export(chosen)
                report["new"], report["old"] = chosen.version, champion.version if champion else None
                registry.begin_moves(run_id, report)
                carry_out(dataset, report, chosen, champion)
            else:
                report["served"] = _repair_store(champion, report) if champion is not None else None
                registry.record_decision(run_id, report)
    return report


def champion_of(dataset: str, found: list[Version]) -> Version | None:
    """Return the champion among the versions of a dataset, if there is one."""
    number = registry.aliases(dataset).get(CHAMPION)
    return next((version for version in found if version.version == number), None)


def alone_with(dataset: str) -> AbstractContextManager[bool]:
    """Hold the lock of a dataset's champion; see `pipelines.files.alone`."""
    lock = store.home() / f".{registered_name(dataset)}.lock"
    return alone(lock, f"the decision about {dataset}", lambda text: print(text, file=sys.stderr))


def carry_out(dataset: str, report: Report, new: Version, old: Version | None) -> None:
    """Make the moves of a recorded decision; those that were made already stay as they are.

    Args:
        new: becomes champion.
        old: was it before.
    """
    tag = export(new)
    if report["decision"] == ROLLED_BACK:
        assert old is not None
        registry.mark_rolled_back(old, datetime.now(UTC).isoformat(timespec="seconds"))
        registry.unmark_rolled_back(new)
        # Whoever asks for a rollback wants it served first of all.
        store.serve(tag)
    if old is not None:
        registry.set_alias(dataset, PREVIOUS, old.version)
    registry.set_alias(dataset, CHAMPION, new.version)
    if registry.aliases(dataset).get(CHALLENGER) == new.version:
        registry.remove_alias(dataset, CHALLENGER)
    store.serve(tag)


def complete_moves(dataset: str) -> list[str]:
    """Carry out what was decided by processes that were killed before they had; return what was done, in sentences.

    To be called under `alone_with`. A decision that another one has overtaken is left, and shown as failed.
    """
    done = []
    by_version = {version.version: version for version in registry.versions(dataset)}
    for run_id, report in registry.begun(dataset):
        new = by_version.get((report or {}).get("new", ""))
        old = by_version.get((report or {}).get("old") or "")
        champion = registry.aliases(dataset).get(CHAMPION)
        if report is None or new is None or champion not in (new.version, old.version if old else None):
            registry.end_moves(run_id, "FAILED")
            continue
        carry_out(dataset, report, new, old)
        registry.end_moves(run_id)
        done.append(f"{dataset}: a decision that was cut off is carried out: {report['text']}")
    return done


def _repair_store(champion: Version, report: Report) -> str | None:
    """Let the store serve the champion; say so in the report if it did not before."""
    try:
        tag, moved = ensure_served(champion)
        if moved:
            report["text"] += f" The model store serves {tag} now."
        return tag
    except ValueError as error:
        # The champion's own files are damaged: what is served stays, as does everything else.
        report["text"] += f" The model store was left as it is: {_reason(error)}"
        return store.latest(champion.name)


def run_rollback(dataset: str) -> Report:
    """Make the previous champion the champion again, and serve it; the rolled-back one becomes `previous`.

    A rollback that was cut off is completed, and no second one is made.

    Raises:
        LookupError: there is no previous champion; nothing has moved.
        ValueError: the previous champion cannot be fetched whole; nothing has moved.
    """
    with alone_with(dataset):
        cut_off = [report for _, report in registry.begun(dataset) if report and report["decision"] == ROLLED_BACK]
        completed = complete_moves(dataset)
        if cut_off and completed:
            return {**cut_off[-1], "text": " ".join(completed)}
        by_version = {version.version: version for version in registry.versions(dataset)}
        aliases = registry.aliases(dataset)
        champion, previous = by_version.get(aliases.get(CHAMPION, "")), by_version.get(aliases.get(PREVIOUS, ""))
        if champion is None or previous is None or champion.version == previous.version:
            raise LookupError(
                f"{registered_name(dataset)} has no previous champion to roll back to: nothing moved. "
                "A rollback is possible after a second version was promoted."
            )
        with registry.decision_run(dataset, "rollback") as run_id:
            tag = export(previous)
            report: Report = {
                "dataset": dataset,
                "decision": ROLLED_BACK,
                "reason": f"asked for: from version {champion.version} back to version {previous.version}",
                "new": previous.version,
                "old": champion.version,
                "champion": previous.lineage(),
                "rolled_back": champion.lineage(),
                "served": tag,
                "decision_run_id": run_id,
                "text": f"{dataset}: version {previous.version} is the champion again and {tag} is served; version "
                f"{champion.version} is now `previous` and is not promoted again by itself.",
            }
            registry.begin_moves(run_id, report)
            carry_out(dataset, report, previous, champion)
    return report


def write_report(report: Report, folder: Path = REPORTS_FOLDER) -> Path:
    """Write a report as DATASET.json, by way of a temporary file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report['dataset']}.json"
    write_whole(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return path


@task(name="score", persist_result=False, cache_policy=NO_CACHE)
def _score(version: Version, data: Dataset, batch_size: int, max_sample_s: float | None) -> torch.Tensor:
    nll = score(version, data, batch_size, max_sample_s)
    mean = format_nll(nll.mean().item(), data.image_shape, data.num_levels)
    get_run_logger().info("version %s: validation %s", version.version, mean)
    return nll


@flow(name="promote", persist_result=False, log_prints=True)
def promote(dataset: str, dry_run: bool = False) -> Report:
    """Let the best registered version of a dataset become champion, if it is better beyond doubt.

    The report is written to reports/promotions/DATASET.json in any case but a dry run.

    Args:
        dry_run: decide and say so, but move and write nothing.

    Raises:
        ValueError: the dataset is unknown, or its prepared file is missing or damaged.
        LookupError: nothing is registered.
        ConnectionError: no decision was possible, because the registry or the store cannot be reached.
    """
    check_dataset(dataset)
    data = load_dataset(DATA_FOLDER / f"{dataset}.safetensors")
    try:
        report = run_promotion(dataset, data, load_params().promote, _score, dry_run)
    except Exception as error:
        ours = isinstance(error, (LookupError, ValueError))
        reason = _reason(error) if ours else _unreachable(error)
        text = f"{dataset}: nothing moved: {reason}"
        if not dry_run:
            write_report({"dataset": dataset, "decision": FAILED, "reason": reason, "text": text})
        if ours:
            raise
        raise ConnectionError(text) from error
    if not dry_run:
        write_report(report)
    print(report["text"])
    return report


def rollback(dataset: str) -> Report:
    """Undo the last promotion of a dataset; see `run_rollback`."""
    check_dataset(dataset)
    report = run_rollback(dataset)
    print(report["text"])
    return report


def history(dataset: str) -> list[str]:
    """Say who replaced whom in a dataset, when, and by how much: a line for each decision, the oldest first.

    Raises:
        LookupError: nothing was decided yet.
    """
    check_dataset(dataset)
    decisions = registry.decisions(dataset)
    if not decisions:
        raise LookupError(f"nothing was decided for {dataset} yet: run python -m pipelines.steps promote {dataset}.")
    return [history_line(report) for report in decisions]


def history_line(report: Report) -> str:
    """Say a decision in one line.

    Args:
        report: as `registry.decisions` returns it.
    """
    what = report.get("reason", "")
    if report["decision"] in (PROMOTED, RELEASED):
        champion, difference = report.get("champion"), report.get("difference")
        what = (
            f"{_named(report['candidate'])} {'replaced ' + _named(champion) if champion else 'is the first champion'}"
        )
        if champion and difference:
            what += (
                f", {difference['mean']:+.3f} nats per image ({100 * report['confidence']:g} % interval "
                f"{difference['low']:+.3f} to {difference['high']:+.3f}, {difference['num_images']} images)"
            )
    elif report["decision"] == ROLLED_BACK:
        what = f"{_named(report['champion'])} replaced {_named(report['rolled_back'])}, asked for"
    return f"{report['when']}  {report['decision']:<11}  {what}"


def _named(scored: Report) -> str:
    return f"version {scored['version']}" + (f" ({scored['pair']})" if "pair" in scored else "")
