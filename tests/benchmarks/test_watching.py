"""The benchmark of the watch charges each service with its own work."""

from statistics import mean

import pytest

from benchmarks import watching


def test_what_is_scored_after_an_answer_is_charged_to_its_own_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one processor the next request waits for it, whichever service it is to."""
    asked, left = {True: 0, False: 0}, 0.0

    def ask(watch: bool, _: int) -> float:
        nonlocal left
        asked[watch] += 1
        waited, left = left, 0.02 if watch and asked[watch] % 4 == 0 else 0.0
        return 0.01 + waited

    monkeypatch.setattr(watching, "REST_S", 0)
    taken = watching.block_means(ask, 6)
    assert mean(taken[False]) == pytest.approx(0.01)
    assert mean(taken[True]) == pytest.approx(0.01 + 0.02 / 4)
    assert [len(means) for means in taken.values()] == [6, 6]
