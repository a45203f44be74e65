"""Realised = planned: compares a run's ledgers with its plan, to the token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from recipes.data.dataset import MixtureDataset
from recipes.data.manifest import Manifest
from recipes.data.stream import SourceStream
from recipes.files import read_lines
from recipes.plan import StagePlan
from recipes.run import Run
from recipes.skips import Skip, counts, jumps, read_skips

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
    skipped: dict[str, int] = field(default_factory=dict)
    """Tokens by source that were left out on purpose; none where nothing was."""
    read_again: dict[str, int] = field(default_factory=dict)
    """Tokens by source that lie behind the stage's planned end, and that a later stage's plan begins with."""

    @property
    def notes(self) -> list[str]:
        """What is as it was decided, but not as in the recipe: a sentence each."""
        if not self.skipped:
            return []
        texts = [f"{self.stage}: {_listed(self.skipped)} left out on purpose (skips.json)"]
        if self.read_again:
            texts.append(
                f"{self.stage}: {_listed(self.read_again)} behind its planned end, which later stages read again"
            )
        return texts


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
    return MixtureDataset(run.plan, stage.name, streams, jumps(stage, read_skips(run, stage.name)))


def _audit_stage(run: Run, stage: StagePlan, digests: bool) -> StageAudit:
    lines = read_lines(run.stage_folder(stage.name) / "ledger.jsonl")
    end = lines[-1]["to_step"] if lines else stage.start_step
    skips = read_skips(run, stage.name)
    read, left_out = counts(stage, skips, (end - stage.start_step) * stage.samples_per_step)
    planned, skipped = (_tokens(stage, samples.tolist()) for samples in (read, left_out))
    realised = {name: sum(line["tokens"].get(name, 0) for line in lines) for name in planned}
    problems = [*_gaps(stage, lines), *_skips(stage, skips, lines), *_differences(planned, realised, lines)]
    if digests and not problems:
        problems += _digests(run, stage, lines)
    return StageAudit(
        stage.name, end, end == stage.end_step, planned, realised, tuple(problems),
        {name: n for name, n in skipped.items() if n}, _read_again(run, stage, planned, skipped),
    )  # fmt: skip


def _tokens(stage: StagePlan, samples: list[int]) -> dict[str, int]:
    return {name: n * stage.sequence_length for name, n in zip(stage.shares, samples, strict=True)}


def _listed(tokens: dict[str, int]) -> str:
    return ", ".join(f"{n:,} tokens of {name}" for name, n in tokens.items())


def _read_again(run: Run, stage: StagePlan, read: dict[str, int], skipped: dict[str, int]) -> dict[str, int]:
    """What was read behind the stage's planned end of sources that a later stage of the main line reads."""
    names = [s.name for s in run.plan.stages]
    later = run.plan.stages[names.index(stage.name) + 1 :] if stage.name in names else ()
    wanted = {name for s in later for name in s.shares}
    beyond = {use.name: read[use.name] + skipped[use.name] - use.tokens for use in stage.sources}
    return {name: n for name, n in beyond.items() if n > 0 and name in wanted}


def _skips(stage: StagePlan, skips: list[Skip], lines: list[dict[str, int]]) -> Iterator[str]:
    """The ledger says what was left out before a line's samples, as skips.json does."""
    for line in lines:
        said = line.get("skipped_samples", 0)
        wanted = sum(skip.samples for skip in skips if line["from_step"] <= skip.after_step < line["to_step"])
        if said != wanted:
            span = f"steps {line['from_step']}–{line['to_step']}"
            yield f"{stage.name}: {said:,} samples were left out in {span}, {wanted:,} by skips.json"


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
