"""The chain of jobs that a run comes to: train, evaluate, propose, a gate, and the next stage. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.tree import Tree

from recipes.errors import UserError
from recipes.plan import Plan, StagePlan
from recipes.show import amount
from recipes.slurm.gate import job_name
from recipes.slurm.profile import Cluster, hours

Kind = Literal["train", "eval", "propose"]
SCRIPT: dict[Kind, str] = {"train": "job.slurm", "eval": "eval.slurm", "propose": "propose.slurm"}
"""A rendered script's name in the stage's folder."""
MARGIN = 1.25
"""Training jobs for this much more time than planned. Chosen: an MFU of 32 % where the plan assumes 40 %."""
LOST_MINUTES = 10
"""Of a training job's time, before its first step. Chosen: preflight, imports, reading the checkpoint."""
PROPOSE_MINUTES = 60


@dataclass(frozen=True)
class Link:
    """Jobs of one kind for one stage."""

    kind: Kind
    stage: str
    name: str
    """In Slurm."""
    jobs: int
    """Submitted one by one and run one after the other; the tasks of an array are one job."""
    tasks: int
    """Of the array; 1 where there is none."""
    nodes: int
    gpus: int
    """Of a job, or of an array's task."""
    minutes: int
    """Time limit."""
    after: tuple[Kind, str] | None
    """What must have succeeded before."""
    gate: bool
    """Whether it waits for `smol approve`."""


def choose_stages(plan: Plan, text: str | None) -> list[StagePlan]:
    """The stages that --stages means: all of the main line, one, or a span such as stage1..stage3.

    Raises:
        UserError: a stage that there is not, or a span that runs backwards.
    """
    main, known = [s.name for s in plan.stages], [s.name for s in plan.stages + plan.branches]
    first, dots, last = (text or f"{main[0]}..{main[-1]}").partition("..")
    for name in filter(None, (first, last)):
        if name not in (main if dots else known):
            fix = f"name one of {', '.join(known)}, or a span such as {main[0]}..{main[-1]}"
            raise UserError(f"--stages {text}: {plan.recipe} has no stage '{name}' there", fix)
    if not dots:
        return [plan.stage(first)]
    span = main[main.index(first or main[0]) : main.index(last or main[-1]) + 1]
    if not span:
        raise UserError(f"--stages {text} runs backwards", f"write {last}..{first}")
    return [plan.stage(name) for name in span]


def stage_after(plan: Plan, stage: str) -> str | None:
    """The main line's stage that follows, if there is one."""
    names = [s.name for s in plan.stages]
    number = names.index(stage) + 1 if stage in names else len(names)
    return names[number] if number < len(names) else None


def train_jobs(stage: StagePlan, gpus: int, cluster: Cluster) -> int:
    """How many jobs of the time limit the stage's planned time needs, with `MARGIN`; each but the last is a spare.

    A job requeues itself at its time limit. The others are there for what requeueing cannot mend: a job that was
    killed at the limit, or a site that does not let jobs requeue.

    Raises:
        UserError: the time limit leaves no time to train.
    """
    useful = cluster.time_limit - cluster.signal_seconds / 60 - min(LOST_MINUTES, cluster.time_limit / 4)
    if useful <= 0:
        found = f"a time limit of {hours(cluster.time_limit)} with a signal {cluster.signal_seconds} s before its end "
        raise UserError(found + "leaves no time to train", "raise time_limit, or lower signal_seconds", cluster.name)
    return max(1, math.ceil(stage.gpu_hours / gpus * 60 * MARGIN / useful))


def make_chain(
    run: str, plan: Plan, stages: Sequence[StagePlan], cluster: Cluster, benchmarks: int, approved: Sequence[str] = ()
) -> list[Link]:
    """The links in the order in which they are submitted.

    Args:
        benchmarks: of the suite.
        approved: stages whose gate is open already; the run's first stage has none.
    """
    chain: list[Link] = []
    main = [s.name for s in plan.stages]
    sweep = cluster.evaluation
    for stage in stages:
        name = stage.name
        gate = name != main[0] and name not in approved
        size = (cluster.nodes, cluster.gpus, cluster.time_limit)
        jobs, before = train_jobs(stage, plan.gpus, cluster), _before(stage, main)
        chain.append(Link("train", name, job_name(run, name, "train"), jobs, 1, *size, before, gate))
        size = (1, sweep.gpus, sweep.time_limit)
        chain.append(Link("eval", name, job_name(run, name, "eval"), 1, benchmarks, *size, ("train", name), False))
        if stage_after(plan, name):
            size = (1, 0, PROPOSE_MINUTES)
            chain.append(Link("propose", name, job_name(run, name, "propose"), 1, 1, *size, ("eval", name), False))
    return chain


def _before(stage: StagePlan, main: list[str]) -> tuple[Kind, str] | None:
    """What a stage's training follows, if that is part of the same chain or may still be queued from an earlier one."""
    if stage.branch:
        return ("train", stage.branch)
    number = main.index(stage.name)
    return ("propose", main[number - 1]) if number else None


def draw_tree(
    run: str, title: str, chain: Sequence[Link], plan: Plan, cluster: Cluster, notes: dict[str, str]
) -> Tree:  # fmt: skip
    """The chain as a tree; `notes` are what to add to a link's line, by its name in Slurm."""
    tree = Tree(f"[bold]{title}[/]")
    branches: dict[str, Tree] = {}
    for link in chain:
        stage = plan.stage(link.stage)
        if link.stage not in branches:
            span = f"{amount(stage.tokens)} tokens, steps {stage.start_step:,} to {stage.end_step:,}"
            branches[link.stage] = tree.add(f"[bold]{link.stage}[/]  {span}")
            if link.gate:
                held = f"held until smol approve {run} {link.stage}{_after(link)}"
                branches[link.stage].add(f"[yellow]gate[/]     {held}")
        note = f"  [green]{notes[link.name]}[/]" if link.name in notes else ""
        branches[link.stage].add(f"[cyan]{link.kind:<8}[/] {_describe(link, stage, plan, cluster)}{note}")
    return tree


def _describe(link: Link, stage: StagePlan, plan: Plan, cluster: Cluster) -> str:
    after = "" if link.gate else _after(link)
    limit = hours(link.minutes)
    if link.kind == "train":
        size = f"{link.nodes} × {cluster.gpus_per_node} GPUs" if link.nodes > 1 else f"{link.gpus} GPUs"
        count = f"{link.jobs} jobs of {limit} in turn" if link.jobs > 1 else f"1 job of {limit}"
        return f"{count}, {size}, {_days(stage.gpu_hours / plan.gpus)} planned{after}"
    if link.kind == "eval":
        where = f"{link.gpus} GPU" + "s" * (link.gpus > 1) if link.gpus else "CPU"
        return f"{link.tasks} × {where}, at most {limit} each{after}"
    return f"1 job, CPU, at most {limit}{after}"


def _after(link: Link) -> str:
    return f", after {link.after[1]}'s {link.after[0]}" if link.after else ""


def _days(hours_planned: float) -> str:
    if hours_planned >= 48:
        return f"{hours_planned / 24:.1f} days"
    return f"{hours_planned:.1f} h" if hours_planned >= 1 else f"{max(1, math.ceil(hours_planned * 60))} min"


def cost_table(chain: Sequence[Link], plan: Plan) -> Table:
    """GPU-hours and cost by stage: training as planned, evaluation at most."""
    title = f"GPU-hours at {plan.mfu:.0%} MFU, and cost at ${plan.gpu_hour_price:.2f} an hour"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "training", "days", "evaluation, at most", "cost"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    totals = [0.0, 0.0]
    for name in dict.fromkeys(link.stage for link in chain):
        stage = plan.stage(name)
        tests = sum(k.tasks * k.gpus * k.minutes / 60 for k in chain if k.stage == name and k.kind == "eval")
        totals = [totals[0] + stage.gpu_hours, totals[1] + tests]
        table.add_row(name, *_row(stage.gpu_hours, tests, plan))
    table.add_section()
    table.add_row("[bold]total[/]", *_row(totals[0], totals[1], plan))
    return table


def _row(training: float, tests: float, plan: Plan) -> tuple[str, ...]:
    figure = f"{training:,.0f}" if training >= 1 else f"{training:.1g}"
    cost = (training + tests) * plan.gpu_hour_price
    return figure, f"{training / plan.gpus / 24:.1f}", f"{tests:,.0f}", f"${cost:,.0f}"
