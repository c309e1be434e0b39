"""The rule of promotion: which version, if any, takes the champion's place. Pure: scores in, a choice out.

Versions are compared by their *total*: mean NLL of an image plus mean NLL of its missing part given the rest, in nats.
Where any version of the pool has no completion scores, the joint NLL alone is the total of all of them. A candidate may
take the place if

- its mean total is lower than the champion's, and in neither part it is worse by more than `allowance`; and
- the confidence interval of the paired difference in total, candidate minus champion, lies below zero; or those of both
  parts do.

Of the candidates that may, the one with the lowest mean total is chosen, of equals the oldest version.

It comes to rest: every move strictly lowers the champion's mean total, which a version has or has not whoever it is
compared with. So no version returns, and a pool of n versions allows n moves at most. Significance alone gives no such
order: A may tie with B and B with C while C beats A. It starves nobody: a version that is better in both parts by
evidence has a lower total, so that there is a move, to it or to one with a lower total still.

Many tries: somebody who trains the same network with a hundred seeds and looks at the same validation images each time
finds two or three that are better beyond a plain 95 % interval. Intervals are therefore widened by Bonferroni's
correction over all pairs of the V versions that were ever compared on these images (`num_versions`), V (V - 1) / 2 of
them: each is one at 1 - (1 - confidence) / pairs. Version V meets the champion for the first time at a one-sided error
of (1 - confidence) / (V (V - 1)), which sums to 1 - confidence over any number of tries (alpha spending; Foster and
Stine 2008, "Alpha-investing"). Looking again at the same pair adds nothing: its scores are the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

ALLOWED_NATS = 0.3  # by which one part of a binary image's score may get worse


@dataclass(frozen=True, eq=False)  # tensors are compared by the rule
class Candidate:
    """A version and its scores; lower is better."""

    version: str  # its number, as text
    joint_nats: Tensor  # (N,) NLL in nats of each validation image
    # (M,) NLL in nats of the missing part, given the rest, of the first M of these; None for a model not scored so.
    completion_nats: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """What `choose` decided."""

    version: str | None  # the new champion; None: nothing moves
    reason: str  # one sentence, without its full stop
    refused: dict[str, str] = field(default_factory=dict)  # the candidates that could not be compared, and why
    best: str | None = None  # the candidate that came closest, the chosen one if there is one; None: none was compared


@dataclass(frozen=True)
class Difference:
    """A mean paired difference in nats, candidate minus champion, and its standard error."""

    mean: float
    stderr: float

    def interval(self, level: float) -> tuple[float, float]:
        """Return the ends of the normal confidence interval at a level such as 0.95.

        Of few images it is too narrow: one of 0.95 misses the mean of ten 8 times in 100, of hundreds 5 times.
        """
        half = NormalDist().inv_cdf((1 + level) / 2) * self.stderr
        return self.mean - half, self.mean + half

    def below_zero(self, level: float) -> bool:
        return self.interval(level)[1] < 0

    def text(self, level: float) -> str:
        low, high = self.interval(level)
        return f"[{low:+.3f}, {high:+.3f}] nats"


def corrected(confidence: float, num_versions: int) -> float:
    """Return the level of each interval, so that those of all pairs of so many versions hold at once."""
    return 1 - (1 - confidence) / max(num_versions * (num_versions - 1) // 2, 1)


def differences(candidate: Candidate, champion: Candidate) -> dict[str, Difference]:
    """Return the differences of two versions that were scored on the same images.

    Returns:
        `joint`, and if both have them `completion` and `total`. The total's error counts the covariance of both parts
        on the images that they share, and is never taken to be larger than the sum of both: what lies below zero in
        both parts does so in the total.
    """
    joint = candidate.joint_nats.double() - champion.joint_nats.double()  # (N,)
    of_joint = Difference(joint.mean().item(), joint.std().item() / math.sqrt(len(joint)))
    if candidate.completion_nats is None or champion.completion_nats is None:
        return {"joint": of_joint}
    completion = candidate.completion_nats.double() - champion.completion_nats.double()  # (M,)
    of_completion = Difference(completion.mean().item(), completion.std().item() / math.sqrt(len(completion)))
    covariance = torch.cov(torch.stack([joint[: len(completion)], completion[: len(joint)]]))[0, 1].item()
    variance = of_joint.stderr**2 + of_completion.stderr**2 + 2 * covariance / max(len(joint), len(completion))
    error = min(math.sqrt(max(variance, 0.0)), of_joint.stderr + of_completion.stderr)
    of_total = Difference(of_joint.mean + of_completion.mean, error)
    return {"joint": of_joint, "completion": of_completion, "total": of_total}


def choose(
    champion: Candidate | None,
    candidates: Sequence[Candidate],
    *,
    confidence: float = 0.95,
    num_versions: int = 2,
    allowance: float = ALLOWED_NATS,
) -> Choice:
    """Choose who takes the champion's place; see the module for the rule and why it comes to rest.

    The order of `candidates` changes nothing. A candidate with a score that is not a finite number, fewer than two
    images, or scores of another number of images than the champion's (without one: than the oldest candidate's) is
    refused. A champion whose scores are no finite numbers stays: without them there is no evidence.

    Args:
        champion: None: the version with the lowest mean total becomes the first.
        candidates: the pool, with or without the champion.
        confidence: of all intervals at once.
        num_versions: how many versions were ever compared on these images, the champion included. The intervals of the
            total count those of this call at least.
        allowance: nats by which the mean of one part may get worse where the total gets better.
    """
    if champion is not None and (problem := _problem(champion, champion)):
        return Choice(None, f"champion version {champion.version} cannot be compared: {problem}")
    others = [c for c in candidates if not champion or c.version != champion.version]
    others.sort(key=lambda c: (len(c.version), c.version))  # the oldest first
    reference = champion or next((c for c in others if not _problem(c, c)), None)
    refused = {c.version: problem for c in others if (problem := _problem(c, reference or c))}
    pool = [c for c in others if c.version not in refused]
    if not pool:
        return Choice(None, "no other version can be compared" if champion else "no version can be compared", refused)
    joint_only = any(c.completion_nats is None for c in (*pool, *([champion] if champion else [])))
    total = {c.version: _total(c, joint_only) for c in pool}
    pool.sort(key=lambda c: total[c.version])
    if champion is None:
        first = pool[0].version
        return Choice(first, "there was no champion, and no version has a lower mean NLL", refused, first)

    to_beat = _total(champion, joint_only)
    level = corrected(confidence, max(num_versions, len(pool) + 1))
    plain = corrected(confidence, num_versions)

    def named(version: str, level: float, intervals: str) -> str:
        return f"the {100 * level:.5g} % interval of version {version} minus champion {champion.version}, {intervals}, "

    kept = ""
    for candidate in pool:
        found = differences(candidate, champion)
        decisive = found["joint" if joint_only else "total"]
        worst = max((name for name in found if name != "total"), key=lambda name: found[name].mean)
        if decisive.below_zero(level):
            reason = named(candidate.version, level, decisive.text(level)) + "lies below zero"
        elif "total" in found and all(found[part].below_zero(plain) for part in ("joint", "completion")):
            joint, completion = found["joint"].text(plain), found["completion"].text(plain)
            both = f"{joint} of whole images and {completion} of missing parts"
            reason = named(candidate.version, plain, both) + "lies below zero"
        else:
            kept = kept or named(candidate.version, level, decisive.text(level)) + "does not lie below zero"
            continue
        if found[worst].mean > allowance:
            kept = kept or f"{reason}, but its {worst} NLL is {found[worst].mean:.3f} nats worse, {allowance:g} allowed"
        elif total[candidate.version] < to_beat:
            return Choice(candidate.version, reason, refused, candidate.version)
    return Choice(None, kept or "no version is better", refused, pool[0].version)


def _total(candidate: Candidate, joint_only: bool) -> float:
    """Return the mean NLL in nats: of whole images, and unless `joint_only` plus that of missing parts."""
    parts = [candidate.joint_nats] if joint_only else [candidate.joint_nats, candidate.completion_nats]
    return sum(part.double().mean().item() for part in parts if part is not None)


def _problem(candidate: Candidate, reference: Candidate) -> str | None:
    """Say why a version cannot be compared with another one; with itself: with any."""
    for name in ("joint", "completion"):
        nats, expected = (getattr(c, f"{name}_nats") for c in (candidate, reference))
        if nats is None:
            continue
        if num := int((~nats.isfinite()).sum()):
            return f"its {name} NLL is not a finite number for {num} of {len(nats)} images"
        if len(nats) < 2:
            return f"{len(nats)} scored image{'' if len(nats) == 1 else 's'} give no interval"
        if expected is not None and len(nats) != len(expected):
            return f"its {name} NLL is of {len(nats)} images, that of version {reference.version} of {len(expected)}"
    return None
