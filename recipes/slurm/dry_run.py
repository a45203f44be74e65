"""`smol launch --dry-run`: the scripts, the chain, its cost and what would be refused; nothing is written."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.errors import UserError, shown
from recipes.run import Run, code_revision
from recipes.slurm import commands
from recipes.slurm.chain import MARGIN, SCRIPT, Link, cost_table, draw_tree
from recipes.slurm.existing import check_queue, check_start, done, job_words, queued, stage_to_go_back_in
from recipes.slurm.order import Order
from recipes.slurm.rollback import check_step

Check = Callable[[Order], None]
"""Raises UserError for what a launch refuses."""


def show(order: Order, checks: Sequence[Check], from_step: int | None, skip_tokens: int, console: Console) -> int:
    """Prints the scripts, the chain, its cost, and what would be refused; writes nothing."""
    show_scripts(order, console)
    jobs, notes, problems = ask_slurm(order)
    console.print(head(order), highlight=False)
    console.print(draw_tree(order.name, title(order), order.chain, order.plan, order.cluster, notes))
    if any(link.jobs > 1 for link in order.chain):
        console.print(f"jobs in turn: for {MARGIN} × the planned time; a stage's end takes those left out of the queue")
    console.print(cost_table(order.chain, order.plan))
    first: list[Check] = [] if jobs is None and order.run else [partial(check_start, jobs=jobs or {})]
    if from_step is not None:
        first.append(partial(show_rollback, jobs=jobs or {}, step=from_step, skip_tokens=skip_tokens, console=console))
    for check in (*first, *checks):
        try:
            check(order)
        except UserError as error:
            problems.append(str(error))
    for warning in order.plan.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    for problem in problems:
        console.print(f"[red]a launch would stop here:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    console.print("dry run: nothing was written or submitted")
    return 2 if problems else 0


def ask_slurm(order: Order) -> tuple[dict[str, list[int]] | None, dict[str, str], list[str]]:
    """The run's jobs, None where Slurm does not say; a note for each link's line; what Slurm would refuse."""
    notes = {link.name: "done" for link in order.chain if done(order, link)}
    if not commands.installed():
        return None, notes, []
    try:
        jobs, problems = queued(order), []
        notes |= {name: f"{job_words(ids)}, queued" for name, ids in jobs.items()}
        links = [link for link in order.chain if link.name not in notes]
        for link, (accepted, answer) in zip(links, test_all(order, links), strict=True):
            notes[link.name] = "Slurm accepts it" if accepted else "[red]Slurm refuses it[/]"
            refused = f"Slurm refuses the {link.kind} job: {answer}"
            problems += [refused] if not accepted and refused not in problems else []
        check_queue(order, jobs)
    except UserError as error:
        return None, notes, [str(error)]
    return jobs, notes, problems


def show_rollback(order: Order, jobs: dict[str, list[int]], step: int, skip_tokens: int, console: Console) -> None:
    """Says where --from-step would go back to; raises UserError if it cannot."""
    stage = stage_to_go_back_in(order, jobs, step)
    assert order.run is not None
    check_step(order.run, order.plan.stage(stage), step, skip_tokens)
    skipped = f", and leaves out the next {skip_tokens:,} tokens" if skip_tokens else ""
    console.print(f"a launch goes back to step {step:,} of {stage} first{skipped}", highlight=False)


def head(order: Order) -> Table:
    """Where the run is, with which code and data."""
    table = Table.grid(padding=(0, 2))
    table.add_row("run", f"{shown(order.folder)}, {'continued' if order.run else 'new'}")
    table.add_row("data", shown(order.data))
    table.add_row("code", code_text(order.run))
    if not commands.installed():
        table.add_row("Slurm", "[yellow]not on this machine: sbatch --test-only was left out[/]")
    return table


def code_text(run: Run | None) -> str:
    """The revision that jobs will run, as far as git knows it, and the run's own if that is another."""
    now = code_revision()
    before = run.settings["code"]["revision"] if run else now["revision"]
    text = f"revision {str(now['revision'])[:12]}" if now["revision"] else "not in git"
    text += ", [yellow]changes not committed[/]" if now["changed"] else ""
    return text + (f"; [yellow]the run was created with {str(before)[:12]}[/]" if before != now["revision"] else "")


def show_scripts(order: Order, console: Console) -> None:
    """Prints each script that says something new; the others differ from a stage's before in its name only."""
    first: dict[str, tuple[str, str]] = {}
    for path, text in order.scripts().items():
        stage, _, name = path.partition("/")
        other, before = first.setdefault(name, (stage, text))
        either = re.compile(rf"\b({re.escape(other)}|{re.escape(stage)})\b")
        same = other != stage and either.sub("", before) == either.sub("", text)
        console.rule(f"{order.name}/{path}", align="left")
        said = f"as {other}/{name}, with {stage} for {other}\n" if same else text
        console.print(said, highlight=False, markup=False, soft_wrap=True, end="")
    console.rule()


def title(order: Order) -> str:
    """The run, its recipe and its cluster."""
    where = f"{order.cluster.name}, {order.cluster.nodes} × {order.cluster.gpus_per_node} GPUs"
    name = "" if order.name == order.recipe.name else f"{order.name}: "
    return f"{name}{order.recipe.name} on {where}"


def test_all(order: Order, links: Sequence[Link]) -> Iterator[tuple[bool, str]]:
    """What sbatch --test-only says to each link's script; the scripts are in a folder of their own meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        for link in links:
            script = Path(folder) / SCRIPT[link.kind]
            script.write_text(order.script(link), encoding="utf-8")
            yield commands.test_only(script)
