"""The rule of promotion: it comes to rest, whatever the pool, its order and who is champion, and starves nobody."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.promotion.rule import Candidate, choose, corrected, differences

NUM_JOINT, NUM_COMPLETED = 120, 60
KINDS = ("normal", "heavy tails", "intransitive", "ties", "no completion", "some without")


def pool_of(kind: str, num: int, seed: int, worst: float = math.inf) -> list[Candidate]:
    """Return versions 1 to `num` whose scores share most of their noise, as those of similar networks do."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size: int) -> torch.Tensor:
        normal = torch.randn(size, generator=generator, dtype=torch.float64)
        return normal / torch.rand(size, generator=generator).clamp_min(1e-3) if kind == "heavy tails" else normal

    image, missing = 90 + 10 * noise(NUM_JOINT), 40 + 8 * noise(NUM_COMPLETED)
    offsets = 0.3 * torch.randn(num, 2, generator=generator, dtype=torch.float64)
    if kind == "ties":
        offsets = offsets.sign() * 0.2
    found = []
    for k in range(num):
        own_joint, own_completion = noise(NUM_JOINT), noise(NUM_COMPLETED)
        if kind == "intransitive":  # each beats the next by a little on most images and loses much on few
            own_joint = torch.where(torch.arange(NUM_JOINT) % num == k, 2.0 + own_joint, -0.1)
            own_completion = torch.where(torch.arange(NUM_COMPLETED) % num == (k + 1) % num, -2.0, 0.1 + own_completion)
        without = kind == "no completion" or (kind == "some without" and k % 3 == 0)
        joint = image + offsets[k, 0] + own_joint
        found.append(Candidate(str(k + 1), joint, None if without else missing + offsets[k, 1] + own_completion))
    return found


def better_in_both(a: Candidate, b: Candidate, z: float = 1.96) -> bool:
    """Say whether the plain intervals of all that both have lie below zero; written apart from the rule's own."""

    def high(x: torch.Tensor, y: torch.Tensor) -> float:
        difference = x - y
        return (difference.mean() + z * difference.std() / math.sqrt(len(difference))).item()

    if a.completion_nats is None or b.completion_nats is None:
        return False
    return high(a.joint_nats, b.joint_nats) < 0 and high(a.completion_nats, b.completion_nats) < 0


def walk(champion: Candidate | None, pool: list[Candidate], choose=choose, **words: float) -> list[str]:
    """Choose again and again; return who became champion, one after the other, and end where one does so twice."""
    by_version, moves = {c.version: c for c in pool}, []
    while (choice := choose(champion, pool, **words)).version is not None:
        moves.append(choice.version)
        champion = by_version[choice.version]
        if len(moves) > len(pool):
            break
    return moves


def test_300_random_pools_every_start_six_orders() -> None:
    circles = dependent = starved = 0
    shuffle = random.Random(0)
    for seed in range(300):
        pool = pool_of(KINDS[seed % len(KINDS)], num=2 + seed % 5, seed=seed)
        by_version = {c.version: c for c in pool}
        orders = [shuffle.sample(pool, len(pool)) for _ in range(6)]
        choices = [{start: choose(by_version.get(start), order) for start in ("", *by_version)} for order in orders]
        dependent += any(one != choices[0] for one in choices)
        chosen = choices[0]
        for start in (None, *pool):
            moves = walk(start, pool, lambda champion, _, c=chosen: c[champion.version if champion else ""])
            circles += len(moves) > len(pool)
            end = by_version[moves[-1]] if moves else start
            starved += end is None or any(better_in_both(c, end) for c in pool)
    assert (circles, dependent, starved) == (0, 0, 0)


pools = st.builds(pool_of, st.sampled_from(KINDS), st.integers(1, 7), st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(
    pool=pools,
    pick=st.integers(0, 6),
    leave_out=st.booleans(),
    num_versions=st.integers(2, 50),
    allowance=st.sampled_from([0.0, 0.3, math.inf]),
    random_=st.randoms(use_true_random=False),
)
def test_it_rests_in_any_pool(pool, pick, leave_out, num_versions, allowance, random_) -> None:
    words = {"num_versions": num_versions, "allowance": allowance}
    champion = pool[pick % len(pool)]
    candidates = [c for c in pool if not leave_out or c is not champion]
    moves = walk(champion, candidates, **words)
    assert len(set(moves)) == len(moves) <= len(pool)
    assert champion.version not in moves
    shuffled = random_.sample(candidates, len(candidates))
    assert choose(champion, shuffled, **words) == choose(champion, candidates, **words)


@settings(max_examples=60, deadline=None)
@given(pool=pools, gain=st.floats(0.05, 5), pick=st.integers(0, 6))
def test_who_is_better_in_both_is_not_kept_out_by_ties(pool, gain, pick) -> None:
    champion = pool[pick % len(pool)]
    wobble = 0.05 * torch.randn(NUM_JOINT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = None if champion.completion_nats is None else champion.completion_nats - gain + wobble[:NUM_COMPLETED]
    better = Candidate("99", champion.joint_nats - gain + wobble, part)
    ties = [replace(champion, version=str(100 + i), joint_nats=champion.joint_nats - 1e-6) for i in range(3)]
    moves = walk(champion, [*ties, *pool, better])
    assert moves, "nothing moved"
    by_version = {c.version: c for c in (*ties, *pool, better)}
    assert not better_in_both(better, by_version[moves[-1]])


def scores(joint: float, completion: float, seed: int = 0, num: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N,) nats of both parts with these means exactly; other seeds differ by 0.1 nats from image to image."""
    own = 0.1 * torch.randn(2, num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    own -= own.mean(dim=1, keepdim=True)
    return joint + own[0], completion + own[1]


def test_a_better_completer_replaces_and_is_not_replaced_back() -> None:
    """0.2 nats worse as a whole, better at completing: it was promoted, and the next decision took it back."""
    first, second = Candidate("1", *scores(90.0, 40.0, 1)), Candidate("2", *scores(90.2, 39.0, 2))
    assert walk(first, [first, second]) == ["2"]
    assert walk(second, [first, second]) == []


def test_a_tie_does_not_keep_out_a_far_better_completer() -> None:
    first, tie = Candidate("1", *scores(90.0, 40.0, 1)), Candidate("2", *scores(89.999, 40.0, 2))
    far_better = Candidate("3", *scores(90.001, 35.0, 3))
    for order in itertools.permutations([first, tie, far_better]):
        assert walk(first, list(order)) == ["3"]


def test_an_intransitive_circle_is_walked_once_at_most() -> None:
    """Each beats the next by evidence in one part; one by one they would replace each other for ever."""
    joints, completions = (90.0, 90.2, 90.1), (40.0, 39.5, 39.7)
    circle = [Candidate(str(i), *scores(joints[i], completions[i], i)) for i in range(3)]
    assert {tuple(walk(start, circle)) for start in circle} == {("1",), ()}


@pytest.mark.parametrize(
    ("cost", "gain", "moves"),
    [(0.0, 0.5, True), (0.2, 0.5, True), (0.4, 0.5, False), (0.0, 0.0, False), (0.0, -0.5, False), (-0.5, 0.0, True)],
)
def test_one_part_may_cost_the_other_what_is_allowed(cost: float, gain: float, moves: bool) -> None:
    first, second = Candidate("1", *scores(5.0, 3.0, 1)), Candidate("2", *scores(5 + cost, 3 - gain, 2))
    choice = choose(first, [second])
    assert (choice.version == "2") == moves, choice.reason
    if cost == 0.4:
        assert choice.reason.endswith("lies below zero, but its joint NLL is 0.400 nats worse, 0.3 allowed")


def test_the_interval_is_the_paired_one() -> None:
    first, second = Candidate("1", *scores(5.0, 3.0, 1)), Candidate("2", *scores(4.9, 3.0, 2))
    difference = second.joint_nats - first.joint_nats
    half = 1.959964 * difference.std().item() / math.sqrt(400)
    found = differences(second, first)
    assert found["joint"].interval(0.95) == pytest.approx((-0.1 - half, -0.1 + half))
    # Fully correlated parts: the error of the total is the sum of both, not less.
    same = Candidate("3", second.joint_nats, first.completion_nats + difference)
    assert differences(same, first)["total"].interval(0.95) == pytest.approx((-0.2 - 2 * half, -0.2 + 2 * half))


def test_the_lowest_total_is_chosen_and_of_equals_the_oldest() -> None:
    champion = Candidate("1", *scores(92.0, 40.0, 1))
    pool = [Candidate(version, *scores(90.0, 40.0, 2)) for version in ("10", "9", "11")]
    for start, order in itertools.product((champion, None), itertools.permutations(pool)):
        assert choose(start, list(order)).version == "9"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_never_chosen(bad: float) -> None:
    champion, good = Candidate("1", *scores(90.0, 40.0, 1)), Candidate("4", *scores(89.0, 39.0, 4))
    broken = []
    for version, part in (("2", 0), ("3", 1)):
        nats = [part_nats.clone() for part_nats in scores(1.0, 1.0, 2)]
        nats[part][7] = bad
        broken.append(Candidate(version, *nats))
    refused = {
        "2": "its joint NLL is not a finite number for 1 of 400 images",
        "3": "its completion NLL is not a finite number for 1 of 400 images",
    }
    for start in (champion, None):
        choice = choose(start, [*broken, good])
        assert (choice.version, choice.refused) == ("4", refused)
        assert choose(start, broken).version is None
    choice = choose(replace(broken[0], version="1"), [good])
    assert choice.version is None
    assert choice.reason == f"champion version 1 cannot be compared: {refused['2']}"


def test_scores_of_other_images_are_refused() -> None:
    champion = Candidate("1", *scores(90.0, 40.0, 1))
    fewer = Candidate("2", *scores(80.0, 30.0, 2, num=300))
    less = Candidate("3", champion.joint_nats - 10, champion.completion_nats[:50] - 10)
    choice = choose(champion, [fewer, less])
    assert choice.version is None
    assert choice.refused == {
        "2": "its joint NLL is of 300 images, that of version 1 of 400",
        "3": "its completion NLL is of 50 images, that of version 1 of 400",
    }
    # Without a champion, what the oldest was scored on counts.
    choice = choose(None, [Candidate("5", *scores(80.0, 30.0, 5)), champion, replace(fewer, version="0")])
    assert choice.version == "0"
    assert choice.refused.keys() == {"1", "5"}
    one = Candidate("6", torch.tensor([1.0]))
    assert choose(champion, [one]).refused == {"6": "1 scored image give no interval"}
    assert choose(None, []).version is choose(champion, []).version is choose(champion, [champion]).version is None


def false_wins(num_tries: int, correlation: float, completes: bool, told: bool, num: int = 100) -> float:
    """Return how often any of many retrainings that differ by their seed alone takes the place from the first one."""
    generator = torch.Generator().manual_seed(0)
    wins = 0
    for _ in range(num):
        versions: list[Candidate] = []
        for k in range(num_tries + 1):
            joint, own = torch.randn(2, 200, generator=generator, dtype=torch.float64)
            completion = correlation * joint[:100] + math.sqrt(1 - correlation**2) * own[:100]
            versions.append(Candidate(str(k), 90 + joint, 40 + completion if completes else None))
        # One after the other, as they are registered: whoever has lost before loses again, at a stricter level.
        singly = ([versions[k]] for k in range(1, num_tries + 1))
        told_looks = (choose(versions[0], one, num_versions=k) for k, one in enumerate(singly, start=2))
        looks = told_looks if told else [choose(versions[0], versions)]
        wins += any(choice.version is not None for choice in looks)
    return wins / num


@pytest.mark.parametrize("completes", [True, False])
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_a_seed_does_not_win_by_chance_over_many_tries(correlation: float, completes: bool) -> None:
    assert false_wins(20, correlation, completes, told=True) <= 0.05
    if correlation == 0 or not completes:
        assert false_wins(20, correlation, completes, told=False) <= 0.05


def test_the_correction_counts_every_pair() -> None:
    assert corrected(0.95, 2) == pytest.approx(0.95)
    assert corrected(0.95, 5) == pytest.approx(0.995)
    champion, better = Candidate("1", *scores(90.0, 40.0, 1)), Candidate("2", *scores(89.98, 40.0, 2))
    assert choose(champion, [better]).version == "2"
    choice = choose(champion, [better], num_versions=40)
    assert choice.version is None
    assert choice.reason.startswith("the 99.994 % interval of version 2 minus champion 1, [")


def test_a_damaged_oldest_candidate_is_no_measure_for_the_others():
    short, good = torch.tensor([1.0]), torch.tensor([3.0, 4.0, 5.0])
    choice = choose(None, [Candidate("1", short), Candidate("2", good)])
    assert choice.version == "2"
    assert list(choice.refused) == ["1"]


def test_total_error_of_fewer_completions():
    g = torch.Generator().manual_seed(0)
    j, c = torch.randn(120, generator=g).double(), torch.randn(60, generator=g).double()
    c = c + j[:60]
    zero = Candidate("1", torch.zeros(120), torch.zeros(60))
    found = differences(Candidate("2", j, c), zero)
    cov = torch.cov(torch.stack([j[:60], c]))[0, 1].item()
    expected = (j.var() / 120 + c.var() / 60 + 2 * cov / 120).item() ** 0.5
    assert abs(found["total"].stderr - expected) < 1e-9
