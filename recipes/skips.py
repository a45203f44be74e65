"""Data that a stage leaves out after a step, since training went wrong on it: `<stage>/skips.json`.

With it, which sample is seen at which step stays a pure function: of the recipe and this list. Behind a skip the
stage's samples run on beyond their planned end by as many as were left out. The plan is the recipe's alone, so the next
stage begins where it was planned to: what the stage has read beyond its end is then read again, in a run of which a
skip is a thousandth. `audit` says how much of which source. The other way, to move all later offsets, would have made
plan.json and every proposal depend on what happened in a run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from recipes.data.interleave import IntArray, Interleave
from recipes.files import write_json
from recipes.plan import StagePlan
from recipes.run import Run

FILE = "skips.json"


@dataclass(frozen=True)
class Skip:
    """Samples left out between two steps."""

    stage: str
    after_step: int
    samples: int
    """Of all ranks together; whole steps of them."""


def read_skips(run: Run, stage: str) -> list[Skip]:
    """The stage's skips in the order of their steps; usually none."""
    path = run.stage_folder(stage) / FILE
    if not path.is_file():
        return []
    return [Skip(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def write_skips(run: Run, stage: str, skips: Sequence[Skip]) -> None:
    """Replaces the stage's skips."""
    write_json(run.stage_folder(stage) / FILE, [asdict(skip) for skip in skips])


def jumps(stage: StagePlan, skips: Sequence[Skip]) -> list[tuple[int, int]]:
    """As MixtureDataset takes them: the first sample behind each skip, and how many were left out there."""
    return [((skip.after_step - stage.start_step) * stage.samples_per_step, skip.samples) for skip in skips]


def counts(stage: StagePlan, skips: Sequence[Skip], samples: int) -> tuple[IntArray, IntArray]:
    """How many of the stage's first `samples` samples are each source's, and how many were left out before them."""
    interleave = Interleave(stage.shares)
    here = [jump for jump in jumps(stage, skips) if jump[0] < samples]
    read, left_out, place = np.zeros(len(stage.shares), dtype=np.int64), np.zeros(len(stage.shares), dtype=np.int64), 0
    for (first, length), end in zip([(0, 0), *here], [*(first for first, _ in here), samples], strict=True):
        left_out += interleave.counts(place + length) - interleave.counts(place)
        place += length
        read += interleave.counts(place + end - first) - interleave.counts(place)
        place += end - first
    return read, left_out
