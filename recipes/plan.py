"""Recipe -> Plan: what a run comes to, in steps, tokens, epochs, GPU-hours and bytes. Neither torch nor nanotron."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from recipes.data.interleave import Interleave
from recipes.recipe import Model, Recipe, Schedule, Source, Stage

H100_FLOPS = 989e12
"""Dense bf16 peak of one H100 SXM (facts: cost)."""
DEFAULT_MFU = 0.40
GPU_HOUR_PRICE = 2.8
"""US dollars. Chosen so that 11T tokens at 40 % MFU come to the paper's "about $250,000"."""
REPETITION_LIMIT = 4.5
"""Epochs of one source or family over the run: the middle of the paper's 4–5 (§4)."""
STATE_BYTES_PER_PARAMETER = 14
"""A checkpoint's: bf16 weight 2, fp32 master weight 4, two fp32 Adam moments 8."""


def learning_rate(schedule: Schedule, step: int) -> float:
    """The rate that Nanotron 0.4 uses in training step `step` (from 1): its factor lags one step, λ(step − 1)."""
    done = step - 1
    if done <= schedule.warmup_steps:
        return schedule.peak_lr * done / max(schedule.warmup_steps, 1)
    if done <= schedule.decay_start_step:
        return schedule.peak_lr
    left = max(0.0, 1 - (done - schedule.decay_start_step) / schedule.decay_steps)
    return schedule.min_lr + (schedule.peak_lr - schedule.min_lr) * left


def flops_per_token(model: Model, sequence_length: int) -> float:
    """Training FLOPs per token: 6 per parameter, and attention counted in full (12 · layers · hidden · sequence)."""
    return 6.0 * model.parameters + 12.0 * model.layers * model.hidden * sequence_length


@dataclass(frozen=True)
class SourceUse:
    """What one stage takes from one source."""

    name: str
    domain: str
    share: Fraction
    """Of the stage's tokens, exact."""
    samples: int
    tokens: int
    offset: int
    """Token offset in the source's endless stream at which the stage begins."""
    epochs: float | None
    """Times the stage goes through the source; none where its unique tokens are unknown."""
    epochs_run: float | None
    """The same from the run's beginning to the stage's end."""


@dataclass(frozen=True)
class FamilyUse:
    """What is taken from sources that overlap, against the unique tokens of the largest."""

    name: str
    sources: tuple[str, ...]
    """Those that are read."""
    samples: int
    tokens: int
    unique_tokens: int
    epochs: float
    epochs_run: float
    """From the run's beginning to the stage's end."""


@dataclass(frozen=True)
class StagePlan:
    """One stage in steps, samples and tokens."""

    name: str
    branch: str | None
    start_step: int
    end_step: int
    sequence_length: int
    micro_batch: int
    accumulation: int
    rope_theta: float
    schedule: Schedule
    samples_per_step: int
    """Of all data-parallel ranks together."""
    samples: int
    tokens: int
    start_lr: float
    """Used in the stage's first step."""
    end_lr: float
    """Used in the stage's last step."""
    gpu_hours: float
    kept_steps: tuple[int, ...]
    """Steps whose checkpoints must be written and are never pruned: branch points and the end."""
    sources: tuple[SourceUse, ...]
    families: tuple[FamilyUse, ...]

    @property
    def steps(self) -> int:
        """Steps of this stage alone."""
        return self.end_step - self.start_step

    @property
    def shares(self) -> dict[str, Fraction]:
        """Exact share by source, in the order of the mixture file."""
        return {use.name: use.share for use in self.sources}

    @property
    def offsets(self) -> dict[str, int]:
        """Token offset by source at which the stage begins; each a multiple of the sequence length."""
        return {use.name: use.offset for use in self.sources}


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to."""

    recipe: str
    seed: int
    block_tokens: int
    parameters: int
    tokens_per_step: int
    steps: int
    tokens: int
    flops: float
    gpus: int
    mfu: float
    gpu_hours: float
    days: float
    gpu_hour_price: float
    cost: float
    decay_start_step: int
    checkpoints: int
    checkpoint_bytes: int
    """Of one checkpoint."""
    checkpoints_kept: int
    dataset_bytes: int
    """Tokenised folders of every source, whole, where the unique tokens are known."""
    stages: tuple[StagePlan, ...]
    branches: tuple[StagePlan, ...]
    families: tuple[FamilyUse, ...]
    warnings: tuple[str, ...] = ()

    def stage(self, name: str) -> StagePlan:
        """The stage or branch of that name; KeyError if there is none."""
        return {stage.name: stage for stage in self.stages + self.branches}[name]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, exact shares as text; `docs/formats.md` lists the keys."""
        data: dict[str, Any] = _plain(asdict(self))
        return data


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, Schedule):
        return value.model_dump()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def make_plan(
    recipe: Recipe,
    mfu: float = DEFAULT_MFU,
    gpu_hour_price: float = GPU_HOUR_PRICE,
    peak_flops: float = H100_FLOPS,
    warnings: Iterable[str] = (),
) -> Plan:
    """Works out the plan; a pure function of the recipe and the figures given.

    Args:
        mfu: share of `peak_flops` (FLOP/s of one GPU) that training reaches.
        gpu_hour_price: in the currency of your choice.
        warnings: lint's, to be shown with the plan.
    """
    carry = _Carry(recipe)
    rate = recipe.parallelism.gpus * peak_flops * mfu
    stages = tuple(_stage_plan(recipe, stage, carry, rate) for stage in recipe.stages)
    main = carry.used
    branches = tuple(_stage_plan(recipe, stage, carry.at_branch(stage, stages), rate) for stage in recipe.branches)
    flops = sum(flops_per_token(recipe.model, s.sequence_length) * s.tokens for s in stages)
    steps, interval, every = stages[-1].end_step, recipe.checkpoints.interval, recipe.checkpoints.keep_every
    forced = {step for stage in stages for step in stage.kept_steps}
    kept = forced | set(range(every, steps + 1, every) if every else ())
    gpu_hours = flops / (peak_flops * mfu) / 3600
    return Plan(
        recipe=recipe.name, seed=recipe.seed, block_tokens=recipe.block_tokens,
        parameters=recipe.model.parameters, tokens_per_step=recipe.tokens_per_step, steps=steps,
        tokens=sum(s.tokens for s in stages), flops=flops, gpus=recipe.parallelism.gpus, mfu=mfu,
        gpu_hours=gpu_hours, days=gpu_hours / 24 / recipe.parallelism.gpus,
        gpu_hour_price=gpu_hour_price, cost=gpu_hours * gpu_hour_price,
        decay_start_step=recipe.schedule.decay_start_step,
        checkpoints=len(forced | set(range(interval, steps + 1, interval))),
        checkpoint_bytes=STATE_BYTES_PER_PARAMETER * recipe.model.parameters,
        checkpoints_kept=len(kept) + recipe.checkpoints.keep_last,
        dataset_bytes=_dataset_bytes(recipe, main), stages=stages, branches=branches,
        families=_families(recipe.sources, [use for s in stages for use in s.sources], main),
        warnings=tuple(warnings),
    )  # fmt: skip


class _Carry:
    """Where each source's stream stands, stage after stage."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.offset: dict[str, int] = defaultdict(int)
        self.used: dict[str, int] = defaultdict(int)

    def start(self, source: str, sequence_length: int) -> int:
        """The stream's offset, moved up to a multiple of the sequence length: at most to the next block."""
        return -(-self.offset[source] // sequence_length) * sequence_length

    def at_branch(self, stage: Stage, stages: tuple[StagePlan, ...]) -> _Carry:
        """The state at the step where `stage` leaves the main line."""
        carry = _Carry(self.recipe)
        for plan in stages:
            samples = (min(plan.end_step, stage.start_step) - plan.start_step) * plan.samples_per_step
            counts = Interleave(plan.shares).counts(samples).tolist()
            tokens = [count * plan.sequence_length for count in counts]
            carry.take(replace(use, tokens=n) for use, n in zip(plan.sources, tokens, strict=True))
            if plan.name == stage.branch:
                break
        return carry

    def take(self, uses: Iterable[SourceUse]) -> None:
        """Moves on by what a stage reads."""
        for use in uses:
            self.offset[use.name] = use.offset + use.tokens
            self.used[use.name] += use.tokens


def _stage_plan(recipe: Recipe, stage: Stage, carry: _Carry, flops_per_second: float) -> StagePlan:
    samples_per_step = recipe.tokens_per_step // stage.sequence_length
    samples = (stage.end_step - stage.start_step) * samples_per_step
    tokens = samples * stage.sequence_length
    shares = stage.mixture.shares
    counts = dict(zip(shares, Interleave(shares).counts(samples).tolist(), strict=True))
    seconds = flops_per_token(recipe.model, stage.sequence_length) * tokens / flops_per_second
    uses = tuple(_use(recipe, stage, carry, name, counts[name]) for name in shares)
    carry.take(uses)
    branch_points = {b.start_step for b in recipe.branches if b.branch == stage.name}
    return StagePlan(
        name=stage.name, branch=stage.branch, start_step=stage.start_step, end_step=stage.end_step,
        sequence_length=stage.sequence_length, micro_batch=stage.micro_batch, accumulation=stage.accumulation,
        rope_theta=stage.rope_theta, schedule=stage.schedule, samples_per_step=samples_per_step, samples=samples,
        tokens=tokens, start_lr=learning_rate(stage.schedule, stage.start_step + 1),
        end_lr=learning_rate(stage.schedule, stage.end_step),
        gpu_hours=seconds / 3600 * recipe.parallelism.gpus,
        kept_steps=tuple(sorted(branch_points | {stage.end_step})), sources=uses,
        families=_families(recipe.sources, uses, carry.used),
    )  # fmt: skip


def _use(recipe: Recipe, stage: Stage, carry: _Carry, name: str, samples: int) -> SourceUse:
    source, tokens = recipe.sources[name], samples * stage.sequence_length
    unique = source.tokens
    return SourceUse(
        name=name, domain=source.domain, share=stage.mixture.shares[name], samples=samples, tokens=tokens,
        offset=carry.start(name, stage.sequence_length), epochs=tokens / unique if unique else None,
        epochs_run=(carry.used[name] + tokens) / unique if unique else None,
    )  # fmt: skip


def _families(sources: dict[str, Source], uses: Iterable[SourceUse], used: dict[str, int]) -> tuple[FamilyUse, ...]:
    """The families of which `uses` read something; where no size is known there is nothing to count.

    Args:
        used: tokens by source from the run's beginning, these uses included.
    """
    reading: dict[str, list[SourceUse]] = defaultdict(list)
    for use in uses:
        if family := sources[use.name].family:
            reading[family].append(use)
    result = []
    for family, members in reading.items():
        all_members = [name for name, source in sources.items() if source.family == family]
        unique = max(sources[name].tokens or 0 for name in all_members)
        if unique:
            tokens, total = sum(use.tokens for use in members), sum(used.get(name, 0) for name in all_members)
            names = tuple(dict.fromkeys(use.name for use in members))
            samples = sum(use.samples for use in members)
            result.append(FamilyUse(family, names, samples, tokens, unique, tokens / unique, total / unique))
    return tuple(result)


def _dataset_bytes(recipe: Recipe, used: dict[str, int]) -> int:
    token_bytes = 2 if recipe.model.vocab_size <= 1 << 16 else 4
    return sum(token_bytes * (recipe.sources[name].tokens or 0) for name in used)
