"""What can be wrong with a recipe although its files are well formed: errors stop, warnings are shown."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.errors import UserError, shown
from recipes.plan import REPETITION_LIMIT, Plan, StagePlan, learning_rate, make_plan
from recipes.recipe import Recipe


@dataclass(frozen=True)
class Finding:
    """One thing that lint has to say."""

    level: Literal["error", "warning"]
    file: Path
    text: str

    def __str__(self) -> str:
        return f"{shown(self.file)}: {self.text}"


def lint(recipe: Recipe) -> list[Finding]:
    """Everything found, errors first. What the loader refuses never gets here."""
    findings = [*_batches(recipe), *_parallelism(recipe), *_optimizer(recipe), *_tokenizer(recipe)]
    findings += _checkpoints(recipe)
    if not any(f.level == "error" for f in findings):
        plan = make_plan(recipe)
        findings += [*_learning_rate(recipe, plan), *_decay(recipe), *_repetition(recipe, plan)]
    return sorted(findings, key=lambda f: f.level)


def checked_plan(recipe: Recipe, **figures: float) -> Plan:
    """The plan with lint's warnings in it; `figures` are `make_plan`'s.

    Raises:
        UserError: lint's first error.
    """
    findings = lint(recipe)
    for finding in findings:
        if finding.level == "error":
            raise UserError(finding.text, "`smol lint` shows everything that is wrong", finding.file)
    return make_plan(recipe, warnings=[f.text for f in findings], **figures)


def _recipe_file(recipe: Recipe) -> Path:
    return recipe.files[0]


def _batches(recipe: Recipe) -> Iterator[Finding]:
    for stage in recipe.stages + recipe.branches:
        dp, micro, accumulation = recipe.parallelism.dp, stage.micro_batch, stage.accumulation
        product = dp * micro * accumulation * stage.sequence_length
        if product != recipe.tokens_per_step:
            sizes = f"dp {dp} × micro_batch {micro} × accumulation {accumulation} × sequence {stage.sequence_length}"
            text = f"{stage.name}: {sizes} = {product:,} tokens, but tokens_per_step is {recipe.tokens_per_step:,}"
            yield Finding("error", stage.file, text)
        if recipe.block_tokens % stage.sequence_length:
            text = f"{stage.name}: block_tokens {recipe.block_tokens:,} is no multiple of {stage.sequence_length:,}"
            yield Finding("error", stage.file, text + ", its sequence_length")


def _parallelism(recipe: Recipe) -> Iterator[Finding]:
    model, parallel, file = recipe.model, recipe.parallelism, _recipe_file(recipe)
    for name in ("heads", "kv_heads", "vocab_size", "ffn"):
        if (size := getattr(model, name)) % parallel.tp:
            yield Finding(
                "error", file, f"model.{name} {size:,} cannot be split over tp {parallel.tp}: write a divisor"
            )
    if model.hidden % model.heads or model.heads % model.kv_heads:
        text = f"heads {model.heads} must divide hidden {model.hidden}, and kv_heads {model.kv_heads} the heads"
        yield Finding("error", file, text)
    elif model.hidden // model.heads % 2:
        yield Finding("error", file, f"a head has {model.hidden // model.heads} dimensions: RoPE needs an even number")
    if parallel.pp > model.layers:
        yield Finding("error", file, f"pp {parallel.pp} is more than the {model.layers} layers")
    if parallel.tp_linear_async_communication:
        text = "tp_linear_async_communication: Nanotron 0.4 computes wrong gradients with it; write false"
        yield Finding("error", file, text)


def _optimizer(recipe: Recipe) -> Iterator[Finding]:
    file = _recipe_file(recipe)
    if recipe.optimizer.zero_stage == 1:
        text = "zero_stage 1: Nanotron 0.4 cannot resume on another number of GPUs, nor go back to stage 0"
        yield Finding("warning", file, text)
    if recipe.model.dtype == "float32" and recipe.optimizer.accumulate_grad_in_fp32:
        text = "accumulate_grad_in_fp32 with dtype float32 is refused by Nanotron 0.4: write false"
        yield Finding("error", file, text)


def _tokenizer(recipe: Recipe) -> Iterator[Finding]:
    file, model, tokenizer = _recipe_file(recipe), recipe.model.vocab_size, recipe.tokenizer
    local = recipe.root / tokenizer.name
    for path in filter(Path.is_file, (local, local / "tokenizer.json")):
        size = _entries(path)
        if size is None:
            yield Finding("error", file, f"tokenizer.name: {path} is no tokenizer.json that has a vocabulary")
        elif size != tokenizer.vocab_size:
            text = f"tokenizer.vocab_size is {tokenizer.vocab_size:,}, but {path} has {size:,} entries"
            yield Finding("error", file, text)
    if model < tokenizer.vocab_size:
        text = f"model.vocab_size {model:,} is smaller than the tokenizer's {tokenizer.vocab_size:,}"
        yield Finding("error", file, text)
    elif model > tokenizer.vocab_size:
        unused = model - tokenizer.vocab_size
        yield Finding("warning", file, f"model.vocab_size has {unused:,} entries that the tokenizer never uses")


def _entries(tokenizer: Path) -> int | None:
    """Of the vocabulary and the added tokens together; None if the file is something else."""
    try:
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        return len(set(content["model"]["vocab"]) | {token["content"] for token in content["added_tokens"]})
    except (ValueError, LookupError, TypeError):
        return None


def _checkpoints(recipe: Recipe) -> Iterator[Finding]:
    interval, every = recipe.checkpoints.interval, recipe.checkpoints.keep_every
    if every % interval:
        text = f"checkpoints.keep_every {every:,} is no multiple of the interval {interval:,}: nothing would be kept"
        yield Finding("error", _recipe_file(recipe), text)


def _learning_rate(recipe: Recipe, plan: Plan) -> Iterator[Finding]:
    """A stage may bring its own schedule; the rate it starts with must follow from the one before."""
    previous = {after.name: before for before, after in itertools.pairwise(plan.stages)}
    previous |= {b.name: plan.stage(b.branch) for b in plan.branches if b.branch}
    for name, before in previous.items():
        after, file = plan.stage(name), recipe.stage(name).file
        if _jump(before, after) > 1e-9:
            ends, starts = _rates(before, after)
            text = f"{name}: the learning rate jumps from {before.name}'s {ends:.4g} to {starts:.4g}"
            yield Finding("error", file, text)


def _rates(before: StagePlan, after: StagePlan) -> tuple[float, float]:
    step = after.start_step + 1
    return learning_rate(before.schedule, step), learning_rate(after.schedule, step)


def _jump(before: StagePlan, after: StagePlan) -> float:
    """Difference of the two schedules at the boundary, relative to the peak."""
    ends, starts = _rates(before, after)
    return abs(ends - starts) / before.schedule.peak_lr


def _decay(recipe: Recipe) -> Iterator[Finding]:
    last, schedule = recipe.stages[-1], recipe.stages[-1].schedule
    start, end = schedule.decay_start_step, schedule.decay_start_step + schedule.decay_steps
    if len(recipe.stages) > 1 and start != last.start_step:
        side, far = (
            ("before", last.start_step - start) if start < last.start_step else ("after", start - last.start_step)
        )
        text = f"the learning rate decays from step {start:,}, {far:,} steps {side} {last.name} starts"
        yield Finding("warning", last.file, f"{text} (step {last.start_step:,})")
    if end != last.end_step:
        text = f"the decay ends at step {end:,}, but the last stage at step {last.end_step:,}"
        yield Finding("warning", last.file, text)


def _repetition(recipe: Recipe, plan: Plan) -> Iterator[Finding]:
    last = {use.name: use for stage in plan.stages for use in stage.sources}
    files = {use.name: recipe.stage(stage.name).mixture_file for stage in plan.stages for use in stage.sources}
    over = f"above {REPETITION_LIMIT} epochs"
    for use in last.values():
        if use.epochs_run is not None and use.epochs_run > REPETITION_LIMIT:
            text = f"{use.name} is repeated {use.epochs_run:.2f} times over the run, {over}"
            yield Finding("warning", files[use.name], text)
    for family in plan.families:
        if len(family.sources) > 1 and family.epochs > REPETITION_LIMIT:
            text = f"the family {family.name} ({', '.join(family.sources)}) comes to {family.epochs:.2f} epochs, {over}"
            yield Finding("warning", files[family.sources[-1]], text)
    if unknown := [use.name for use in last.values() if use.epochs_run is None]:
        text = f"repetition not checked where the unique tokens are unknown: {', '.join(unknown)}"
        yield Finding("warning", recipe.files[0], text)
