"""Realised = planned: compares a run's ledgers with its plan, to the token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from recipes.data.dataset import MixtureDataset
from recipes.data.interleave import Interleave
from recipes.data.manifest import Manifest
from recipes.data.stream import SourceStream
from recipes.files import read_lines
from recipes.plan import StagePlan
from recipes.run import Run

DIGEST_SAMPLES = 4096
"""Samples read at once when digests are worked out again."""


@dataclass(frozen=True)
class StageAudit:
    """What a stage was to read and what it read, up to the last step of its ledger."""

    stage: str
    end_step: int
    """Last step that the ledger covers; the stage's start if it has none."""
    complete: bool
    planned: dict[str, int]
    """Tokens by source among the samples up to `end_step`."""
    realised: dict[str, int]
    problems: tuple[str, ...]


def audit(run: Run, *, digests: bool = False) -> list[StageAudit]:
    """Audits every stage that has begun.

    Args:
        digests: read all planned samples again and compare their content with what was fed, not only the counts.
    """
    stages = [s for s in run.plan.stages + run.plan.branches if run.stage_folder(s.name).is_dir()]
    return [_audit_stage(run, stage, digests) for stage in stages]


def stage_dataset(run: Run, stage: StagePlan) -> MixtureDataset:
    """The stage's samples, as its training reads them."""
    streams = {
        name: SourceStream(Manifest.load(run.data(name)), run.plan.seed, run.plan.block_tokens) for name in stage.shares
    }
    return MixtureDataset(run.plan, stage.name, streams)


def _audit_stage(run: Run, stage: StagePlan, digests: bool) -> StageAudit:
    lines = read_lines(run.stage_folder(stage.name) / "ledger.jsonl")
    end = lines[-1]["to_step"] if lines else stage.start_step
    counts = Interleave(stage.shares).counts((end - stage.start_step) * stage.samples_per_step)
    planned = {name: n * stage.sequence_length for name, n in zip(stage.shares, counts.tolist(), strict=True)}
    realised = {name: sum(line["tokens"].get(name, 0) for line in lines) for name in planned}
    problems = [*_gaps(stage, lines), *_differences(planned, realised, lines)]
    if digests and not problems:
        problems += _digests(run, stage, lines)
    return StageAudit(stage.name, end, end == stage.end_step, planned, realised, tuple(problems))


def _gaps(stage: StagePlan, lines: list[dict[str, int]]) -> Iterator[str]:
    step = stage.start_step
    for line in lines:
        if line["from_step"] != step:
            yield f"{stage.name}: the ledger goes from step {step:,} to {line['from_step']:,}"
        step = line["to_step"]


def _differences(
    planned: dict[str, int], realised: dict[str, int], lines: list[dict[str, dict[str, int]]]
) -> list[str]:
    unplanned = sorted({name for line in lines for name in line["tokens"]} - set(planned))
    found = [f"{name}: tokens of a source that is not planned" for name in unplanned]
    for name, tokens in planned.items():
        if realised[name] != tokens:
            found.append(f"{name}: {realised[name]:,} tokens read, {tokens:,} planned")
    return found


def _digests(run: Run, stage: StagePlan, lines: list[dict[str, int | str]]) -> Iterator[str]:
    dataset = stage_dataset(run, stage)
    for line in lines:
        first, last = (int(line[key]) - stage.start_step for key in ("from_step", "to_step"))
        digest = digest_of(dataset, first * stage.samples_per_step, last * stage.samples_per_step)
        if digest != line["digest"]:
            span = f"steps {line['from_step']}–{line['to_step']}"
            yield f"{stage.name}: the tokens fed in {span} are not the planned ones"


def digest_of(dataset: MixtureDataset, first: int, end: int) -> str:
    """The ledger's digest of samples [first, end): see `sample_digest`; their sum, whatever the order."""
    total = 0
    for start in range(first, end, DIGEST_SAMPLES):
        numbers = np.arange(start, min(end, start + DIGEST_SAMPLES))
        total += sum(map(sample_digest, dataset[numbers], numbers.tolist()))
    return f"{total % (1 << 64):016x}"


def sample_digest(tokens: np.ndarray, number: int) -> int:
    """xxh3-64 of a sample's tokens, with its global number as the seed."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).tobytes(), seed=number)
