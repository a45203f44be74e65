"""`smol status` and `smol cancel`: runs as tables for people, and the end of their jobs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from recipes import slurm
from recipes.files import append_line
from recipes.show import amount, bytes_of
from recipes.standing import Json, RunStatus, StageStatus, find, read, read_all

BLOCKS = "▁▂▃▄▅▆▇█"
WATCH_SECONDS = 5.0


def show(run: str | None, console: Console, as_json: bool = False) -> None:
    """Prints how one run stands, or all runs below runs/ in a line each.

    Raises:
        UserError: there is no such run.
    """
    runs = [read(find(run))] if run else read_all()
    if as_json:
        print(json.dumps(runs[0].as_dict() if run else [status.as_dict() for status in runs], indent=2))
    else:
        console.print(picture(runs[0]) if run else overview(runs))


def watch(run: str | None, console: Console, seconds: float = WATCH_SECONDS, rounds: int | None = None) -> None:
    """Shows it again and again, until Ctrl-C or for so many rounds; into a file or a pipe one after the other."""
    folder = find(run) if run else None
    done = 0
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while rounds is None or done < rounds:
            status = picture(read(folder)) if folder else overview(read_all())
            live.update(status, refresh=True) if console.is_terminal else console.print(status)
            done += 1
            if done != rounds:
                time.sleep(seconds)


def cancel(run: str, console: Console) -> None:
    """Cancels the run's jobs, running and queued; what is trained stays, and `smol launch` goes on with it.

    Raises:
        UserError: there is no such run, or no Slurm.
    """
    folder = find(run)
    jobs = sorted({job.id for job in slurm.queue(folder=folder) if job.state not in slurm.ENDED})
    if not jobs:
        console.print(f"{folder.name}: no job is queued or running")
        return
    slurm.cancel(jobs)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    append_line(folder / "events.jsonl", {"event": "cancel", "jobs": jobs, "time": now}, sync=True)
    console.print(f"{folder.name}: cancelled {', '.join(map(str, jobs))}; smol launch goes on from its checkpoints")


def picture(status: RunStatus) -> RenderableType:
    """One run: its stages, its figures, its jobs."""
    where = f"{status.recipe}, {status.gpus} GPUs" + (f" of {status.cluster}" if status.cluster else "")
    parts: list[RenderableType] = [f"[bold]{escape(status.run)}[/]  {escape(where)}", stages_table(status)]
    parts += [f"[red]{stage.name} {stage.state}:[/] {escape(stage.reason)}" for stage in status.stages if stage.reason]
    parts.append(figures(status))
    if status.slurm:
        parts.append(f"[yellow]Slurm could not be asked: {escape(status.slurm)}[/]")
    return Group(*parts, jobs_table(status.jobs)) if status.jobs else Group(*parts)


def stages_table(status: RunStatus) -> Table:
    """A line a stage: a bar, figures, and the loss's picture."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "state", "", "step", "tokens", "loss", "", "lr", "tok/s/GPU", "MFU", "left"):
        words = name in ("stage", "state", "")
        table.add_column(name, justify="left" if words else "right", no_wrap=True)
    for stage in status.stages:
        steps = max(1, stage.end_step - stage.start_step)
        table.add_row(
            stage.name, stage.state, ProgressBar(steps, stage.step - stage.start_step, width=16),
            f"{stage.step:,}/{stage.end_step:,}", f"{amount(stage.tokens)}/{amount(stage.tokens_planned)}",
            shown(stage.loss, ".3f"), sparkline(stage.losses), shown(stage.lr, ".2e"),
            shown(stage.tokens_per_s_per_gpu, ",.0f"), shown(stage.mfu, ".0%"),
            duration(stage.seconds_left) if stage.state == "training" else "",
        )  # fmt: skip
    return table


def figures(status: RunStatus) -> Table:
    """The run's figures, a line each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = [
        ("to the run's end", f"{duration(status.seconds_left)} of training"),
        ("restarts", counted(status.restarts)),
        ("stops", counted(status.stops)),
        ("goodput", shown(status.goodput, ".1%") or "?"),
        ("disk", bytes_of(status.disk_bytes)),
        ("next gate", status.next_gate or "none"),
    ]
    for name, text in rows:
        table.add_row(f"[dim]{name}[/]", escape(text))
    return table


def counted(causes: dict[str, int]) -> str:
    """Causes and how often."""
    return ", ".join(f"{count} × {cause}" for cause, count in sorted(causes.items())) or "none"


def jobs_table(jobs: Sequence[Json]) -> Table:
    """Jobs that may still run, or all that were submitted if squeue was not asked."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    keys = ("id", "kind", "stage", "state", "nodes", "time_used", "time_left", "reason")
    for key in keys:
        table.add_column(key.replace("_", " "))
    for job in jobs:
        if job.get("live", True):
            table.add_row(*(escape(str(job.get(key, ""))) for key in keys))
    return table


def overview(runs: Sequence[RunStatus]) -> RenderableType:
    """All runs, a line each."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "recipe", "stage", "state", "step", "loss", "tok/s/GPU", "left", "restarts", "jobs"):
        table.add_column(name, no_wrap=True)
    for status in runs:
        stage = status.current or StageStatus("?", "?", 0, 0, 0, 0, 0)
        live = Counter(str(job["state"]).lower() for job in status.jobs if job.get("live"))
        table.add_row(
            status.run, status.recipe, stage.name, stage.state, f"{stage.step:,}/{stage.end_step:,}",
            shown(stage.loss, ".3f"), shown(stage.tokens_per_s_per_gpu, ",.0f"), duration(status.seconds_left),
            str(sum(status.restarts.values())), ", ".join(f"{n} {state}" for state, n in live.items()),
        )  # fmt: skip
    problem = next((status.slurm for status in runs if status.slurm), None)
    note = [f"[yellow]Slurm could not be asked: {escape(problem)}[/]"] if problem else []
    return Group(table, *note) if runs else "no runs yet: smol launch starts one"


def sparkline(values: Sequence[float]) -> str:
    """Numbers as a row of blocks, the lowest at the bottom."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def shown(value: float | None, form: str) -> str:
    """A number in a format; empty if there is none."""
    return "" if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """Seconds as people read them: 12 d 3 h, 5 h 20 min, 40 s."""
    if seconds is None:
        return "?"
    whole = timedelta(seconds=round(seconds))
    hours, minutes = divmod(whole.seconds // 60, 60)
    if whole.days:
        return f"{whole.days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{whole.seconds} s"
