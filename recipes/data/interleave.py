"""Which source a sample comes from: exact shares after every sample, by arithmetic alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, overload

import numpy as np

from recipes.errors import UserError

IntArray = np.ndarray[Any, np.dtype[np.int64]]

MAX_PERIOD = 1 << 20
"""Longest pattern of samples that a mixture may need: its tables then take 5 MiB and about a second."""
MAX_SAMPLE = 1 << 62
"""Sample numbers and ranks up to here fit an int64 with room for sums."""


class Interleave:
    """A periodic assignment of samples to sources in which no source is ever a whole sample off its share.

    The shares are exact, so after as many samples as their common denominator, the period, every source has an
    exact whole number and the pattern starts again. Inside a period Tijdeman's chairman assignment holds
    ("The chairman assignment problem", Discrete Mathematics 32, 1980): for every source and every n,
    |samples among the first n − n · share| < 1.
    """

    period: int
    """Samples after which the pattern repeats."""

    def __init__(self, shares: Mapping[str, Fraction]) -> None:
        """Builds one period.

        Args:
            shares: exact share by source; their order is the order of the source indices, and of nothing else.

        Raises:
            UserError: a share that is not positive, shares that do not sum to 1, or a period above 1,048,576.
        """
        self.period = _period(shares)
        counts = [int(share * self.period) for share in shares.values()]
        self._counts = np.array(counts, dtype=np.int64)
        by_name = sorted(range(len(counts)), key=list(shares).__getitem__)  # ties go to the first name
        assigned = _assign([counts[i] for i in by_name], self.period)
        self._source: np.ndarray[Any, Any] = np.array(by_name, dtype=assigned.dtype)[assigned]
        self._rank = np.empty(self.period, dtype=np.int32)
        for i, count in enumerate(counts):
            self._rank[self._source == i] = np.arange(count, dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables: 5 for each slot of the period, 6 where there are more than 256 sources."""
        return self._source.nbytes + self._rank.nbytes

    @overload
    def locate(self, n: int) -> tuple[int, int]: ...
    @overload
    def locate(self, n: IntArray) -> tuple[IntArray, IntArray]: ...
    def locate(self, n: int | IntArray) -> tuple[int, int] | tuple[IntArray, IntArray]:
        """The source index of sample n (from 0), and how many samples that source has before it.

        Args:
            n: one sample number, or an array of them, from 0 to 2^62.

        Returns:
            Two ints for an int, two int64 arrays of n's shape for an array.

        Raises:
            IndexError: a sample number outside [0, 2^62].
        """
        if isinstance(n, np.ndarray):
            return self._locate_array(n)
        _check(n, n)
        repeats, slot = divmod(int(n), self.period)
        source = int(self._source[slot])
        return source, repeats * int(self._counts[source]) + int(self._rank[slot])

    def _locate_array(self, n: IntArray) -> tuple[IntArray, IntArray]:
        if n.size:
            _check(n.min(), n.max())
        repeats, slot = np.divmod(n.astype(np.int64, copy=False), self.period)
        source = self._source[slot].astype(np.int64)
        return source, repeats * self._counts[source] + self._rank[slot]

    def counts(self, n: int) -> IntArray:
        """Samples of each source among the first n: (sources,) int64, in the order of the shares.

        Raises:
            IndexError: n outside [0, 2^62].
        """
        _check(n, n)
        repeats, slots = divmod(int(n), self.period)
        begun = np.bincount(self._source[:slots], minlength=len(self._counts))
        return repeats * self._counts + begun.astype(np.int64, copy=False)


def _check(lowest: int, highest: int) -> None:
    if lowest < 0 or highest > MAX_SAMPLE:
        raise IndexError(f"sample {lowest if lowest < 0 else highest} is outside [0, 2^62]")


def _period(shares: Mapping[str, Fraction]) -> int:
    for name, share in shares.items():
        if share <= 0:
            raise UserError(f"the share of '{name}' is {share}", "write a share above 0, or leave the source out")
    if (total := sum(shares.values(), Fraction(0))) != 1:
        fix = "change them so that they sum to exactly 1; nothing is normalised"
        raise UserError(f"the shares sum to {total} ({float(total):.10g})", fix)
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period > MAX_PERIOD:
        found = f"the shares repeat only after {period:,} samples, above {MAX_PERIOD:,}"
        raise UserError(found, "write the shares with fewer decimals")
    return period


def _assign(counts: list[int], period: int) -> np.ndarray[Any, Any]:
    """The source of each slot of a period: (period,) of the smallest unsigned type.

    Sample r of a source with c slots is released at slot floor(r·P/c) and due before slot ceil((r+1)·P/c); each slot
    takes the released sample that is due first. That every sample meets its due slot is Tijdeman's theorem; it gives
    the bound, and that a source never has two samples waiting.
    """
    source = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    per_source = np.array(counts)[source]
    released = rank * period // per_source
    due = -(-(rank + 1) * period // per_source)
    arrivals = np.bincount(released, minlength=period)
    # Due slot and source in one number; seen through memory views, a million of them stay small.
    waiting = (due * len(counts) + source)[np.argsort(released, kind="stable")].data
    assigned = np.empty(period, dtype=np.min_scalar_type(len(counts) - 1))
    heap: list[int] = []
    first = 0
    for slot, arrived in enumerate(arrivals.data):
        for key in waiting[first : first + arrived]:
            heapq.heappush(heap, key)
        first += arrived
        assigned[slot] = heapq.heappop(heap) % len(counts)
    return assigned
