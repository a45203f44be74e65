"""What is fed into the model: a rank's micro-batches as Nanotron takes them, and the count of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import recipes.engine.compat  # noqa: F401  before nanotron

# isort: split
from nanotron.parallel.pipeline_parallel.tensor_pointer import TensorPointer

from recipes.audit import sample_digest
from recipes.data.dataset import MixtureDataset, rank_samples
from recipes.data.interleave import IntArray
from recipes.data.manifest import Manifest
from recipes.data.stream import SourceStream, Tokens
from recipes.run import Run
from recipes.skips import Skip

MicroBatch = dict[str, Any]
"""input_ids, input_mask, label_ids and label_mask: tensors of (samples, sequence_length), or pointers to the pipeline
rank that has them."""
HELDOUT_SEQUENCES = 64
"""Sequences of each domain that a held-out loss is taken over."""


@dataclass(frozen=True)
class Place:
    """A rank's place in the pipeline."""

    rank: int
    input: int
    """The pipeline rank that takes the inputs."""
    output: int
    """The pipeline rank that takes the labels."""

    @property
    def has_data(self) -> bool:
        """False for ranks in the middle, which get activations only."""
        return self.rank in (self.input, self.output)


def micro_batch(tokens: Tokens | None, place: Place) -> MicroBatch:
    """Inputs and labels of samples: (samples, sequence_length + 1) tokens; None on ranks without data."""
    batch: MicroBatch = {}
    for part, home, columns in (("input", place.input, slice(None, -1)), ("label", place.output, slice(1, None))):
        if place.rank != home:
            batch |= {f"{part}_ids": TensorPointer(home), f"{part}_mask": TensorPointer(home)}
        else:
            assert tokens is not None
            ids = torch.from_numpy(tokens[:, columns].astype(np.int64))
            batch |= {f"{part}_ids": ids, f"{part}_mask": torch.ones_like(ids, dtype=torch.bool)}
    return batch


class Feed:
    """One rank's micro-batches from a step of its stage to the stage's end."""

    def __init__(self, dataset: MixtureDataset, place: Place, *, dp: int, dp_rank: int, counts: bool) -> None:
        """`counts` for one rank of those that get the same samples: the first of its tensor and pipeline groups."""
        self.dataset, self.place, self.dp, self.dp_rank, self.counts = dataset, place, dp, dp_rank, counts
        self.seconds = 0.0
        """Spent on reading since it was last set to 0."""
        self._samples = np.zeros(len(dataset.stage.shares), dtype=np.int64)
        self._digest = 0

    def batches(self, step: int) -> Iterator[MicroBatch]:
        """Micro-batches from `step`, counted from 0 at the stage's start; counts each as it is handed over."""
        stage = self.dataset.stage
        for n in range(step, stage.steps):
            for numbers in rank_samples(n, stage.samples_per_step, self.dp, self.dp_rank, stage.micro_batch):
                yield self._hand_over(numbers)

    def _hand_over(self, numbers: IntArray) -> MicroBatch:
        began = time.perf_counter()
        tokens = self.dataset[numbers] if self.place.has_data else None
        if self.counts:
            assert tokens is not None
            self._samples += np.bincount(self.dataset.sources(numbers), minlength=len(self._samples))
            self._digest += sum(map(sample_digest, tokens, numbers.tolist()))
        batch = micro_batch(tokens, self.place)
        self.seconds += time.perf_counter() - began
        return batch

    def take_count(self) -> tuple[list[int], int]:
        """Samples by source, in the order of the stage's shares, and their digest, since the last call."""
        count = self._samples.tolist(), self._digest
        self._samples[:], self._digest = 0, 0
        return count


def ledger_line(
    first: int,
    last: int,
    sources: Sequence[str],
    sequence_length: int,
    counts: Iterable[tuple[list[int], int]],
    skips: Iterable[Skip] = (),
) -> dict[str, Any]:
    """One line of ledger.jsonl: what all ranks fed in the steps after `first` up to `last`.

    Args:
        counts: each rank's `Feed.take_count()`.

    Returns:
        from_step (exclusive), to_step, tokens by source, and digest: the sum modulo 2^64 of the samples' digests, which
        depends neither on their order nor on the number of ranks; skipped_samples where any were left out.
    """
    samples, digests = zip(*counts, strict=True)
    totals = np.sum(samples, axis=0).tolist()
    tokens = {name: total * sequence_length for name, total in zip(sources, totals, strict=True)}
    line = {"from_step": first, "to_step": last, "tokens": tokens, "digest": f"{sum(digests) % (1 << 64):016x}"}
    skipped = sum(skip.samples for skip in skips if first <= skip.after_step < last)
    return {**line, "skipped_samples": skipped} if skipped else line


def heldout_domains(run: Run) -> list[str]:
    """The domains that the run has held-out text of."""
    return [d for d in sorted({s.domain for s in run.recipe.sources.values()}) if run.heldout(d).is_dir()]


def heldout_batches(run: Run, domain: str, sequence_length: int, size: int) -> list[Tokens]:
    """Up to 64 sequences of a domain's held-out text in batches of `size`: (size, sequence_length + 1) each.

    The same ones at every call; none where the text is shorter than a sequence.
    """
    manifest = Manifest.load(run.heldout(domain))
    count = min(HELDOUT_SEQUENCES, manifest.blocks(sequence_length))
    if count == 0:
        return []
    stream = SourceStream(manifest, run.plan.seed, sequence_length)
    offsets = np.arange(count, dtype=np.int64) * sequence_length
    return [stream.samples(offsets[i : i + size], sequence_length) for i in range(0, count, size)]
