"""The interleaving: never a whole sample off, exact for ever, the same one by one and all at once."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.bench.data import greedy_index
from recipes.data.interleave import MAX_PERIOD, MAX_SAMPLE, Interleave
from recipes.errors import UserError

Shares = dict[str, Fraction]


@st.composite
def mixtures(draw: st.DrawFn, most: int = 40) -> Shares:
    """Up to `most` sources, with shares down to 0.0002."""
    parts = draw(st.sampled_from([60, 997, 4096, 5000]))
    cuts = draw(st.lists(st.integers(1, parts - 1), unique=True, max_size=most - 1))
    edges = [0, *sorted(cuts), parts]
    return {f"s{i}": Fraction(b - a, parts) for i, (a, b) in enumerate(pairwise(edges))}


EVEN = {"rare": Fraction(1, 5000), "rest": Fraction(4999, 5000)}
NUMBERS = st.integers(0, MAX_SAMPLE - 10_000)


def farthest(shares: Shares, sources: np.ndarray, first: int = 0, before: np.ndarray | None = None) -> Fraction:
    """The farthest that any source is from its share after any of these samples, `before` counting the first ones."""
    period = Interleave(shares).period
    worst = 0
    for i, share in enumerate(shares.values()):
        # In units of 1/period and as differences from the first sample, so that int64 is exact.
        start = int(before[i]) * period - first * int(share * period) if before is not None else 0
        counted = np.cumsum(sources == i) * period
        exact = np.arange(1, len(sources) + 1) * int(share * period)
        worst = max(worst, int(np.abs(start + counted - exact).max()))
    return Fraction(worst, period)


@settings(max_examples=60, deadline=None)
@given(mixtures(), NUMBERS)
def test_no_source_is_ever_a_sample_off_its_share(shares: Shares, first: int) -> None:
    interleave = Interleave(shares)
    numbers = first + np.arange(interleave.period + 1)
    sources, _ = interleave.locate(numbers)
    assert farthest(shares, sources, first, interleave.counts(first)) < 1


@settings(max_examples=200, deadline=None)
@given(mixtures(), NUMBERS)
def test_counts_are_less_than_a_sample_from_the_share_and_sum_to_n(shares: Shares, n: int) -> None:
    counts = Interleave(shares).counts(n).tolist()
    assert sum(counts) == n
    assert all(abs(count - n * share) < 1 for count, share in zip(counts, shares.values(), strict=True))


@settings(max_examples=200, deadline=None)
@given(mixtures(), NUMBERS)
def test_locate_is_the_inverse_of_counts(shares: Shares, n: int) -> None:
    interleave = Interleave(shares)
    source, rank = interleave.locate(n)
    before, after = interleave.counts(n), interleave.counts(n + 1)
    assert before[source] == rank
    assert (after - before).tolist() == [int(i == source) for i in range(len(shares))]


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.lists(st.integers(0, MAX_SAMPLE), max_size=30))
def test_arrays_and_ints_agree(shares: Shares, numbers: list[int]) -> None:
    interleave = Interleave(shares)
    sources, ranks = interleave.locate(np.array(numbers, dtype=np.int64))
    assert (sources.dtype, ranks.dtype) == (np.int64, np.int64)
    one_by_one = [interleave.locate(n) for n in numbers]
    assert one_by_one == list(zip(sources.tolist(), ranks.tolist(), strict=True))
    assert all(type(part) is int for place in one_by_one for part in place)


def test_the_greedy_rule_breaks_the_bound_that_this_one_keeps() -> None:
    shares = {f"s{i}": Fraction(percent, 100) for i, percent in enumerate([2, 71, 20, 1, 3, 3])}
    greedy, _ = greedy_index([float(share) for share in shares.values()], 1000, seconds=60)
    assert farthest(shares, np.frombuffer(greedy, dtype=np.uint8)) == Fraction(3, 2)
    assert farthest(shares, Interleave(shares).locate(np.arange(1000))[0]) < 1


def test_indices_follow_the_order_of_the_shares() -> None:
    for shares in (EVEN, dict(reversed(EVEN.items()))):
        counts = Interleave(shares).counts(5000)
        assert dict(zip(shares, counts.tolist(), strict=True)) == {"rare": 1, "rest": 4999}


def test_one_source_takes_everything() -> None:
    interleave = Interleave({"only": Fraction(1)})
    assert (interleave.period, interleave.locate(MAX_SAMPLE)) == (1, (0, MAX_SAMPLE))


def test_more_sources_than_a_byte_counts() -> None:
    interleave = Interleave({f"s{i}": Fraction(1, 300) for i in range(300)})
    sources, _ = interleave.locate(np.arange(300))
    assert sorted(sources.tolist()) == list(range(300))


def test_the_longest_period() -> None:
    shares = {"rare": Fraction(3, MAX_PERIOD), "rest": Fraction(MAX_PERIOD - 3, MAX_PERIOD)}
    interleave = Interleave(shares)
    sources, ranks = interleave.locate(np.arange(MAX_PERIOD))
    assert (interleave.period, interleave.nbytes) == (MAX_PERIOD, 5 * MAX_PERIOD)
    assert ranks[sources == 0].tolist() == [0, 1, 2]
    assert farthest(shares, sources) < 1


BAD = [
    ({"a": Fraction(1, 2), "b": Fraction("0.50005")}, r"sum to 20001/20000 \(1\.00005\)"),
    ({"a": Fraction(1), "b": Fraction(0)}, "share of 'b' is 0"),
    ({"a": Fraction(11, 10), "b": Fraction(-1, 10)}, "share of 'b' is -1/10"),
    ({}, "sum to 0"),
    ({"a": Fraction(1, 1_048_577), "b": Fraction(1_048_576, 1_048_577)}, "1,048,577 samples.*fewer decimals"),
]


@pytest.mark.parametrize(("shares", "message"), BAD)
def test_bad_shares_are_refused(shares: Shares, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Interleave(shares)


@pytest.mark.parametrize("n", [-1, MAX_SAMPLE + 1])
def test_numbers_outside_are_refused(n: int) -> None:
    interleave = Interleave(EVEN)
    for number in (n, np.array([0, n])):
        with pytest.raises(IndexError, match=str(n)):
            interleave.locate(number)
    with pytest.raises(IndexError, match=str(n)):
        interleave.counts(n)


@given(mixtures(), st.randoms(use_true_random=False), NUMBERS)
def test_the_order_in_the_file_changes_nothing(shares: Shares, random: Random, first: int) -> None:
    names = list(shares)
    random.shuffle(names)
    other = {name: shares[name] for name in names}
    n = np.arange(first, first + 3000)
    (sources, ranks), (others, other_ranks) = Interleave(shares).locate(n), Interleave(other).locate(n)
    assert [list(shares)[i] for i in sources] == [names[i] for i in others]
    assert (ranks == other_ranks).all()
