"""The samples of a stage by their number, and which of them each data-parallel rank trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from recipes.data.interleave import IntArray, Interleave
from recipes.data.stream import FEW, SourceStream, Tokens
from recipes.errors import UserError

if TYPE_CHECKING:
    from recipes.plan import Plan


class MixtureDataset:
    """One stage's samples: number n, counted over all ranks, is a pure function of the plan and the token files.

    `Interleave` gives n's source and rank r in it; the tokens are the source's stream at the stage's offset plus
    r · sequence_length. Where the run has left data out (recipes/skips.py), n counts only what is read.
    """

    def __init__(
        self, plan: Plan, stage: str, streams: Mapping[str, SourceStream], jumps: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Opens a stage.

        Args:
            stage: the name of one of the plan's stages.
            streams: a stream for each of the stage's sources; others are ignored.
            jumps: pairs (n, k): from sample n on, k more samples of the interleaving have been left out.

        Raises:
            UserError: a source without a stream, sources of different tokenizers, or blocks that are no multiple of
                the sequence length.
        """
        self.stage = plan.stage(stage)
        self.sequence_length = self.stage.sequence_length
        if missing := [name for name in self.stage.shares if name not in streams]:
            raise UserError(f"{stage} has no tokens of {', '.join(missing)}", "tokenise them first: smol tokenize")
        self.streams = [streams[name] for name in self.stage.shares]
        self._offsets = np.array([self.stage.offsets[name] for name in self.stage.shares], dtype=np.int64)
        self._interleave = Interleave(self.stage.shares)
        self._jumps = jumps
        self._dtype = self.streams[0].manifest.dtype
        _check(self.streams, self.sequence_length)

    def __len__(self) -> int:
        """Samples of the whole stage, all ranks together."""
        return self.stage.samples

    def __getitem__(self, n: int | slice | IntArray) -> Tokens:
        """The tokens of sample n, or of several samples.

        Returns:
            (sequence_length + 1,) for an int; (k, sequence_length + 1) for a slice or an int64 array of k numbers.

        Raises:
            IndexError: a number outside [0, len); negative ones and a slice's bounds are no exception.
        """
        if isinstance(n, slice):
            return self._samples(self._range(n))
        if isinstance(n, np.ndarray):
            return self._samples(n)
        source, offset = self.locate(int(n))
        return self.streams[source].sample(offset, self.sequence_length)

    @overload
    def locate(self, n: int) -> tuple[int, int]: ...
    @overload
    def locate(self, n: IntArray) -> tuple[IntArray, IntArray]: ...
    def locate(self, n: int | IntArray) -> tuple[int, int] | tuple[IntArray, IntArray]:
        """Where samples come from: the index of the source among the stage's shares, the token offset in its stream.

        Returns:
            Two ints for an int, two int64 arrays of n's shape for an array.

        Raises:
            IndexError: a number outside [0, len).
        """
        if isinstance(n, np.ndarray):
            if n.size:
                self._check(n.min(), n.max())
            sources, ranks = self._interleave.locate(n + self._left_out(n))
            return sources, self._offsets[sources] + ranks * self.sequence_length
        self._check(n, n)
        source, rank = self._interleave.locate(n + self._left_out(n))
        return source, int(self._offsets[source]) + rank * self.sequence_length

    def _left_out(self, n: Any) -> Any:
        """How many samples were left out before sample n, or each of an array of them."""
        return sum(length * (n >= first) for first, length in self._jumps)

    def sources(self, numbers: IntArray) -> IntArray:
        """The source of each sample, as an index into the stage's shares: int64 of the numbers' shape.

        Raises:
            IndexError: a number outside [0, len).
        """
        return self.locate(numbers)[0]

    def _samples(self, numbers: IntArray) -> Tokens:
        out = np.empty((len(numbers), self.sequence_length + 1), dtype=self._dtype)
        if len(numbers) < FEW:
            for row, n in zip(out, numbers.tolist(), strict=True):
                row[:] = self[n]
            return out
        sources, offsets = self.locate(numbers)
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            out[rows] = self.streams[source].samples(offsets[rows], self.sequence_length)
        return out

    def _range(self, numbers: slice) -> IntArray:
        wanted = range(numbers.start or 0, len(self) if numbers.stop is None else numbers.stop, numbers.step or 1)
        if wanted:
            self._check(min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1]))
        return np.arange(wanted.start, wanted.stop, wanted.step, dtype=np.int64)

    def _check(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= len(self):
            outside = lowest if lowest < 0 else highest
            raise IndexError(f"sample {outside} is outside {self.stage.name}'s [0, {len(self)})")


def _check(streams: list[SourceStream], sequence_length: int) -> None:
    first = streams[0].manifest
    for stream in streams:
        manifest = stream.manifest
        if (manifest.tokenizer_sha256, manifest.dtype) != (first.tokenizer_sha256, first.dtype):
            found = f"'{manifest.source}' and '{first.source}' are of different tokenizers"
            raise UserError(found, "tokenise both with the recipe's tokenizer", manifest.folder)
        if stream.block_tokens % sequence_length:
            found = f"block_tokens {stream.block_tokens:,} is no multiple of the sequence length {sequence_length:,}"
            raise UserError(found, "change one of the two in the recipe")


def rank_samples(step: int, samples_per_step: int, dp: int, rank: int, micro_batch: int) -> IntArray:
    """The sample numbers that one data-parallel rank trains on in one step.

    Step s holds the samples [s · samples_per_step, (s + 1) · samples_per_step), whatever dp and micro_batch are.

    Args:
        step: from 0 at the stage's start.
        rank: from 0 to dp − 1.
        micro_batch: samples that a rank takes at once.

    Returns:
        (accumulation, micro_batch) int64, numbers from the stage's start.

    Raises:
        UserError: samples_per_step is no multiple of dp · micro_batch, or the rank is outside [0, dp).
    """
    if samples_per_step % (dp * micro_batch):
        found = f"{samples_per_step:,} samples a step do not divide among dp {dp} × micro-batch {micro_batch}"
        raise UserError(found, "choose a dp and a micro_batch whose product divides them")
    if not 0 <= rank < dp:
        raise UserError(f"there is no rank {rank} among {dp}", "give a rank from 0 to dp − 1")
    groups = np.arange(samples_per_step // (dp * micro_batch), dtype=np.int64)[:, None] * dp + rank
    numbers: IntArray = groups * micro_batch + np.arange(micro_batch, dtype=np.int64)
    return step * samples_per_step + numbers
