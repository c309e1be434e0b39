"""Whether drawings are still like those of the reference, and which of two models finds them likelier: statistics.

Drift is tested window by window: a statistic's values of 100 drawings against the reference's, by the two-sample
Kolmogorov-Smirnov distance, whatever their distribution. Of bits per dimension, which cost as much as an answer, they
are those of every fourth drawing. The limit is such that, as long as nothing has changed, an alarm anywhere in 10,000
drawings and three statistics has a probability of 1 %: Bonferroni over all these tests, with the bound
2 exp(-2 d^2 n m / (n + m)), which ties make smaller. A change that moves the distribution function by more than the
limit (with 200 values of the reference 0.29, of bits per dimension 0.50) and what chance adds is found in the first
window that it fills, after 199 drawings at most.

That supposes drawings that do not depend on each other. Those of one visit do: see docs/runbooks.md.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WINDOW = 100  # drawings
SCORE_EVERY = 4  # drawings of a dataset
STATISTICS = {"bits_per_dim": WINDOW // SCORE_EVERY, "ink_share": WINDOW, "known_share": WINDOW}  # values of a window
HORIZON = 10_000  # drawings, distributed as the reference is, over which ...
FALSE_ALARMS = 0.01  # ... this is the probability of any alarm
LOOKED_AT = 500  # the number of drawings from which on a challenger's alert may fire
ALPHA = 0.05  # 1 - confidence of the confidence sequence of two models' difference
DIGITS = 5  # that a reference's values have behind the point (pipelines/promotion/reference.py)


def distance(a: list[float], b: list[float]) -> float:
    """Return the largest difference of two samples' distribution functions; what differs by rounding is equal."""
    rounded = [np.sort([round(value, DIGITS) for value in values]) for values in (a, b)]
    at = np.concatenate(rounded)
    below = [np.searchsorted(values, at, side="right") / len(values) for values in rounded]
    return float(np.abs(below[0] - below[1]).max())


@dataclass
class Drift:
    """The test of one statistic: add values, and read what the last full window of `size` said."""

    reference: list[float]
    size: int = WINDOW
    window: list[float] = field(default_factory=list)
    num_windows: int = 0
    distance: float = 0.0
    has_drifted: bool = False

    @property
    def limit(self) -> float:
        """The critical Kolmogorov-Smirnov distance of a window: a larger one is drift."""
        num_tests = len(STATISTICS) * HORIZON / WINDOW
        return math.sqrt(math.log(2 * num_tests / FALSE_ALARMS) / 2 * (1 / self.size + 1 / len(self.reference)))

    def add(self, value: float) -> bool:
        """Take a value; return whether it completed a window."""
        self.window.append(value)
        if len(self.window) < self.size:
            return False
        self.distance = distance(self.window, self.reference)
        self.has_drifted = self.distance > self.limit
        self.num_windows += 1
        self.window = []
        return True

    def describe(self) -> dict[str, Any]:
        """Return what GET /drawings answers of it."""
        told = {"drifted": self.has_drifted, "distance": self.distance, "limit": self.limit}
        return {**told, "windows": self.num_windows, "in_window": len(self.window)}


def drifts_from(reference: dict[str, list[float]]) -> dict[str, Drift]:
    """Return the test of each statistic; of none where one has too few values for a limit below 1, or none."""
    tests = {name: Drift(reference.get(name, []), size) for name, size in STATISTICS.items()}
    return tests if all(one.reference and one.limit < 1 for one in tests.values()) else {}


@dataclass
class Paired:
    """Differences of two models on the same drawings: their mean and its interval, whatever came when."""

    num: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of the deviations from the mean, summed up (Welford)

    def add(self, difference: float) -> None:
        self.num += 1
        deviation = difference - self.mean
        self.mean += deviation / self.num
        self.squares += deviation * (difference - self.mean)

    def interval(self) -> dict[str, float]:
        """Return the mean, and an interval that holds it at all numbers of differences at once, with 95 % confidence:
        one may look at it whenever one likes. Everything, as long as there are fewer than two.

        Source: the asymptotic confidence sequence of Waudby-Smith et al. 2021, arXiv:2103.06476, narrowest (1.5 times
        an interval for one look) at about `LOOKED_AT` differences.
        """
        half = math.inf
        if self.num > 1:
            bound = 2 * math.log(1 / ALPHA)
            tuned = (bound + math.log(1 + bound)) / LOOKED_AT  # rho squared
            scaled = self.num * tuned + 1
            half = math.sqrt(self.squares / (self.num - 1) * scaled * math.log(scaled / ALPHA**2) / tuned) / self.num
        return {"low": self.mean - half, "mean": self.mean, "high": self.mean + half}
