"""Recipes and plans as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recipes.plan import Plan, StagePlan

if TYPE_CHECKING:
    from recipes.audit import StageAudit


def wide_console() -> Console:
    """A console of at least 100 columns, which is what the tables need."""
    console = Console()
    return console if console.width >= 100 else Console(width=100)


def amount(number: float, unit: str = "") -> str:
    """A number as the field writes it: 5.4T, 75B, 2.1M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}{unit}"
    return f"{number:.4g}{unit}"


def bytes_of(number: float) -> str:
    """Bytes with a decimal prefix."""
    return amount(number).replace("k", " k").replace("M", " M").replace("B", " G").replace("T", " T") + "B"


def epochs_of(epochs: float | None) -> str:
    """Epochs, or ? where the unique tokens are unknown."""
    return "?" if epochs is None else f"{epochs:.2f}"


def show_plan(plan: Plan, console: Console) -> None:
    """Prints the run, its stages, their sources, families and warnings."""
    console.print(_overview(plan))
    console.print(stages_table(plan))
    console.print(_sources(plan))
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)


def _overview(plan: Plan) -> Table:
    table = Table(title=f"{plan.recipe}: the run", show_header=False, title_justify="left", box=SIMPLE_HEAD)
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("steps × tokens a step", f"{plan.steps:,} × {plan.tokens_per_step:,} = {amount(plan.tokens)} tokens"),
        ("learning rate decays from", f"step {plan.decay_start_step:,}"),
        ("training FLOPs", f"{plan.flops:.3g}"),
        ("GPUs, at MFU", f"{plan.gpus}, {plan.mfu:.0%}"),
        ("GPU-hours, days", f"{plan.gpu_hours:,.0f}, {plan.days:.1f}"),
        ("cost", f"${plan.cost:,.0f} at ${plan.gpu_hour_price:.2f} a GPU-hour"),
        ("checkpoints", f"{plan.checkpoints:,} of {bytes_of(plan.checkpoint_bytes)}, {plan.checkpoints_kept} kept "
                        f"= {bytes_of(plan.checkpoints_kept * plan.checkpoint_bytes)}"),
        ("tokenised data", f"{bytes_of(plan.dataset_bytes)} (sources of known size)"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table


def stages_table(plan: Plan) -> Table:
    """The plan's stages and branches, a line each."""
    table = _numbers("stages", 1, "stage", "start step", "end step", "tokens", "seq", "lr first", "lr last",
                     "GPU-hours")  # fmt: skip
    for stage in plan.stages + plan.branches:
        name = f"{stage.name} < {stage.branch}" if stage.branch else stage.name
        steps = f"{stage.start_step:,}", f"{stage.end_step:,}"
        rates = f"{stage.start_lr:.3g}", f"{stage.end_lr:.3g}"
        table.add_row(
            name,
            *steps,
            amount(stage.tokens),
            str(stage.sequence_length),
            *rates,
            f"{stage.gpu_hours:,.0f}" if stage.gpu_hours >= 1 else f"{stage.gpu_hours:.1g}",
        )
    return table


def _numbers(title: str, words: int, *columns: str) -> Table:
    """A table whose first `words` columns are words and the others numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < words else "right", no_wrap=True)
    return table


def _sources(plan: Plan) -> Table:
    table = _numbers("sources", 3, "stage", "domain", "source", "share %", "samples", "tokens", "epochs", "so far")
    for stage in plan.stages + plan.branches:
        for row in _source_rows(stage):
            table.add_row(*row)
        table.add_section()
    return table


def _source_rows(stage: StagePlan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for i, use in enumerate(stage.sources):
        share = f"{float(use.share * 100):.4g}"
        first, epochs = stage.name if i == 0 else "", (epochs_of(use.epochs), epochs_of(use.epochs_run))
        rows.append((first, use.domain, use.name, share, f"{use.samples:,}", amount(use.tokens), *epochs))
    for family in stage.families:
        if family.epochs_run > max(use.epochs_run or 0 for use in stage.sources if use.name in family.sources):
            epochs = epochs_of(family.epochs), epochs_of(family.epochs_run)
            rows.append(("", "family", family.name, "", f"{family.samples:,}", amount(family.tokens), *epochs))
    return rows


def show_audits(plan: Plan, audits: list[StageAudit], console: Console) -> None:
    """Prints realised against planned tokens by stage, and what differs."""
    table = _numbers("realised = planned", 2, "stage", "verdict", "steps", "tokens planned", "tokens realised")
    for found in audits:
        verdict = "[red]differs" if found.problems else "[green]equal" if found.complete else "[yellow]equal so far"
        tokens = f"{sum(found.planned.values()):,}", f"{sum(found.realised.values()):,}"
        table.add_row(found.stage, verdict, f"{plan.stage(found.stage).start_step:,}–{found.end_step:,}", *tokens)
    console.print(table)
    for text in (text for found in audits for text in found.problems):
        console.print(f"[red]{text}", highlight=False, soft_wrap=True)
    for note in (note for found in audits for note in found.notes):
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
