"""A decision: which versions may compete, what they score, and what the rule makes of that. Nothing moves here."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines.errors import reason, reason_or_raise
from pipelines.params import PromoteParams
from pipelines.promotion.checks import check_candidate
from pipelines.promotion.rule import ALLOWED_NATS, Candidate, Choice, choose, corrected, differences
from pipelines.promotion.score import MisfitError
from pipelines.registry import versions as registry
from pipelines.registry.decisions import KEPT, PROMOTED, Report, versions_compared
from pipelines.registry.runs import CHAMPION
from pipelines.registry.versions import Version
from pixelcnn.data import Dataset
from pixelcnn.evaluation import format_nll

ALLOWED_BITS_PER_DIM = 0.01  # as ALLOWED_NATS, of images that are not binary

Scorer = Callable[[Version, Dataset, int], Candidate]

logger = logging.getLogger(__name__)


class Decision:
    """One decision about a dataset: `report` says all of it.

    Args:
        data: the current prepared data; versions that were measured on others do not compete.
        only: the one version that competes, even if it was rolled back; None for all.
        scorer: `pipelines.promotion.score.score`, or the same as a task of Prefect's.
        dry_run: say what would move.
    """

    def __init__(
        self, dataset: str, data: Dataset, params: PromoteParams, only: int | None, scorer: Scorer, dry_run: bool
    ) -> None:
        self.dataset, self.data, self.params = dataset, data, params
        self.score: Callable[[Version], Candidate] = lambda version: scorer(version, data, params.batch_size)
        self.by_number = {version.version: version for version in registry.versions(dataset)}
        self.champion = champion = self.by_number.get(registry.aliases(dataset).get(CHAMPION, ""))
        self.skipped: dict[str, str] = {}  # version -> why
        self.report: Report = {
            "dataset": dataset,
            "data_hash": data.data_hash,
            "protocol": data.protocol,
            "champion": champion and self._described(champion.version),
            "candidate": None,
            "confidence": params.confidence,
            "compared": [],
            "old": champion and champion.version,
            "served": None,
        }
        choice = self._decide(only)
        self.report |= {
            "decision": PROMOTED if choice.version else KEPT,
            "reason": choice.reason,
            "new": choice.version,
            "skipped": [{"version": number, "reason": why} for number, why in self.skipped.items()],
        }
        self.report["text"] = self._text(dry_run)

    def _decide(self, only: int | None) -> Choice:
        champion = self.champion
        if champion is not None and champion.version == str(only):
            return Choice(None, f"version {only} is the champion already")
        wanted = [v for v in self.by_number.values() if v is not champion and only in (None, int(v.version))]
        able = [version for version in wanted if self._may_compete(version, asked_for=only is not None)]
        if not able:
            return Choice(None, "no other version can compete" if champion else "no version can become champion")
        misfit, of_champion = "", None
        if champion is not None:
            try:
                of_champion = self.score(champion)
            except MisfitError as error:
                misfit = f"champion version {champion.version} cannot be compared: {reason(error).rstrip('.')}; "
            except Exception as error:
                return Choice(None, f"champion version {champion.version} cannot be scored: {reason_or_raise(error)}")
        pool, uniform = [], math.prod(self.data.image_shape) * math.log(self.data.num_levels)
        for number, version in enumerate(able, start=1):
            logger.info("%s: version %s, %d of %d", self.dataset, version.version, number, len(able))
            try:
                scores = self.score(version)
                if of_champion is None and scores.joint_nats.mean().item() >= uniform:
                    raise ValueError(f"it is no better than the uniform distribution, {self._format(uniform)}")
                pool.append(scores)
            except Exception as error:  # the next one may be fine
                self.skipped[version.version] = reason_or_raise(error)
        choice = self._chosen(of_champion, pool)
        if misfit:
            choice = replace(choice, reason=misfit + choice.reason.removeprefix("there was no champion, and "))
        return choice

    def _may_compete(self, version: Version, asked_for: bool) -> bool:
        data_hash, now = version.tags.get("data_hash", ""), self.data.data_hash
        if data_hash != now:
            why = f"it was measured on other data (hash {data_hash[:12] or 'unknown'}, now {now[:12]})"
        elif version.rolled_back and not asked_for:
            why = "it was rolled back; rollback --to, or promote --version, would bring it back"
        elif not math.isfinite(version.recorded_nll):
            why = "its recorded validation NLL is not a finite number"
        else:
            return True
        self.skipped[version.version] = why
        return False

    def _chosen(self, champion: Candidate | None, pool: list[Candidate]) -> Choice:
        """Let the rule choose, and check its choice before it counts: a leak would win them all by cheating."""
        allowance = ALLOWED_BITS_PER_DIM * (math.prod(self.data.image_shape) * math.log(2))
        if self.data.num_levels == 2:
            allowance = ALLOWED_NATS
        compared = {scores.version for scores in [*pool, *([champion] if champion else [])]}
        num_versions = len(compared | versions_compared(self.dataset, self.data.data_hash))
        confidence = self.params.confidence
        while True:
            choice = choose(champion, pool, confidence=confidence, num_versions=num_versions, allowance=allowance)
            self.skipped |= choice.refused
            if choice.version is None:
                break
            try:
                model, _ = registry.load(self.by_number[choice.version])
                check_candidate(model, self.data.levels("validation", slice(0, 1))[0], self.params.max_sample_s)
                break
            except Exception as error:  # the next one may be fine
                self.skipped[choice.version] = reason_or_raise(error)
            pool = [scores for scores in pool if scores.version != choice.version]
        self.report["compared"] = sorted(compared, key=int)
        self.report["confidence"] = level = corrected(confidence, num_versions)
        best = next((scores for scores in pool if scores.version == choice.best), None)
        for role, scores in (("champion", champion), ("candidate", best)):
            if scores is not None:
                self.report[role] = self._described(scores.version, scores)
        if best is not None and champion is not None:
            for name, difference in differences(best, champion).items():
                low, high = difference.interval(level)
                self.report[f"{name}_difference"] = {"mean": difference.mean, "low": low, "high": high}
        return choice

    def _described(self, number: str, scores: Candidate | None = None) -> dict[str, Any]:
        version = self.by_number[number]
        found: dict[str, Any] = {**version.lineage(), "pair": version.tags.get("pair", "unknown")}
        if scores is not None:
            named = {"nll_nats": scores.joint_nats, "completion_nats": scores.completion_nats}
            means = {name: nats.mean().item() for name, nats in named.items() if nats is not None}
            found |= {name: mean for name, mean in means.items() if math.isfinite(mean)}
        return found

    def _format(self, nats: float) -> str:
        return format_nll(nats, self.data.image_shape, self.data.num_levels)

    def _text(self, dry_run: bool) -> str:
        what, new = f"nothing {'would move' if dry_run else 'moved'}", self.report["new"]
        if new is not None:
            what = f"version {new} {'would be' if dry_run else 'is'} the new champion"
        text = f"{self.dataset} ({self.data.protocol}, data {self.data.data_hash[:12]}): {what}: "
        text = f"{'dry run: ' if dry_run else ''}{text}{self.report['reason'].rstrip('.')}."
        scores = [
            f"{role} version {scored['version']} ({scored['pair']}) {self._format(scored['nll_nats'])}"
            for role in ("candidate", "champion")
            if (scored := self.report[role]) and "nll_nats" in scored
        ]
        text += f" Validation: {', '.join(scores)}." if scores else ""
        skipped = [f"version {number}: {why.rstrip('.')}" for number, why in self.skipped.items()]
        return text + (f" Passed over: {'; '.join(skipped)}." if skipped else "")
