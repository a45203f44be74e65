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

from recipes.files import append_line
from recipes.show import amount, bytes_of
from recipes.slurm import commands
from recipes.slurm.standing import ACTIVE, Json, RunStatus, StageStatus, find, read, read_all

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
    jobs = sorted({job.id for job in commands.queue(folder=folder) if job.state not in commands.ENDED})
    if not jobs:
        console.print(f"{folder.name}: no job is queued or running")
        return
    commands.cancel(jobs)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    append_line(folder / "events.jsonl", {"event": "cancel", "jobs": jobs, "time": now}, sync=True)
    console.print(f"{folder.name}: cancelled {', '.join(map(str, jobs))}; smol launch goes on from its checkpoints")


def picture(status: RunStatus) -> RenderableType:
    """One run: its stages, its figures, its jobs."""
    where = f"{status.recipe}, {status.gpus} GPUs" + (f" of {status.cluster}" if status.cluster else "")
    parts: list[RenderableType] = [f"[bold]{escape(status.run)}[/]  {escape(where)}", stages_table(status)]
    parts += [f"[red]{stage.name} {stage.state}:[/] {escape(stage.reason)}" for stage in status.stages if stage.reason]
    parts += [figures(status), *unreachable([status])]
    return Group(*parts, jobs_table(status.jobs)) if status.jobs else Group(*parts)


def unreachable(runs: Sequence[RunStatus]) -> list[str]:
    """Says that what squeue knows is missing, if it is."""
    problem = next((status.slurm for status in runs if status.slurm), None)
    return [f"[yellow]Slurm could not be asked: {escape(problem)}[/]"] if problem else []


def stages_table(status: RunStatus) -> Table:
    """A line a stage: how far it is."""
    table = plain_table("stage", "state", "", "step", "tokens", "loss", "left", words=3)
    for stage in status.stages:
        steps = max(1, stage.end_step - stage.start_step)
        table.add_row(
            stage.name, stage.state, ProgressBar(steps, stage.step - stage.start_step, width=10),
            f"{stage.step:,}/{stage.end_step:,}", f"{amount(stage.tokens)}/{amount(stage.tokens_planned)}",
            shown(stage.loss, ".3f"), duration(stage.seconds_left) if stage.state == "training" else "",
        )  # fmt: skip
    return table


def plain_table(*columns: str, words: int) -> Table:
    """A table whose first `words` columns are words and the others numbers; 100 columns hold what is usual."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < words else "right", no_wrap=i > 0, overflow="fold")
    return table


def figures(status: RunStatus) -> Table:
    """The figures of the stage that is trained, and of the run, a line each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    stage = status.current
    rows = [
        ("loss", f"{sparkline(stage.losses)} in {stage.name}" if stage and stage.losses else ""),
        ("learning rate", shown(stage.lr, ".2e") if stage else ""),
        ("speed", speed(stage) if stage else ""),
        ("last step", f"{duration(stage.idle_seconds)} ago" if stage and stage.state in ACTIVE else ""),
        ("to the run's end", run_left(status)),
        ("restarts", counted(status.restarts)),
        ("stops", counted(status.stops)),
        ("goodput", shown(status.goodput, ".1%")),
        ("disk", bytes_of(status.disk_bytes)),
        ("upload", status.upload or ""),
        ("next gate", status.next_gate or "none"),
    ]
    for name, text in rows:
        if text:
            table.add_row(f"[dim]{name}[/]", escape(text))
    return table


def speed(stage: StageStatus) -> str:
    """What a GPU does, and of what it could do at best."""
    mfu = f", MFU {stage.mfu:.0%}" if stage.mfu is not None else ""
    return f"{stage.tokens_per_s_per_gpu:,.0f} tokens/s/GPU{mfu}" if stage.tokens_per_s_per_gpu else ""


def run_left(status: RunStatus) -> str:
    """The time that the rest of the run takes."""
    if status.seconds_left is None:
        return "unknown until a step is done"
    return f"{duration(status.seconds_left)} of training" if status.seconds_left else "trained to its end"


def counted(causes: dict[str, int]) -> str:
    """Causes and how often."""
    return ", ".join(f"{count} × {cause}" for cause, count in sorted(causes.items())) or "none"


def jobs_table(jobs: Sequence[Json]) -> Table:
    """Jobs that may still run, or all that were submitted if squeue was not asked; those that are alike in one line."""
    keys = ("kind", "stage", "state", "nodes", "time_used", "time_left", "reason")
    alike: dict[tuple[str, ...], list[str]] = {}
    for job in (job for job in jobs if job.get("live", True)):
        alike.setdefault(tuple(str(job.get(key, "")) for key in keys), []).append(str(job.get("id")))
    used = [i for i in range(len(keys)) if any(row[i] for row in alike)]
    table = plain_table("jobs", *(keys[i].replace("_", " ") for i in used), words=9)
    for row, ids in alike.items():
        shown_ids = ids[0] if len(ids) == 1 else f"{ids[0]} … {ids[-1]} ({len(ids)})"
        table.add_row(escape(shown_ids), *(escape(row[i]) for i in used))
    return table


def overview(runs: Sequence[RunStatus]) -> RenderableType:
    """All runs, a line each, and what needs a person."""
    table = plain_table("run", "stage", "state", "done", "loss", "tokens/s/GPU", "left", "restarts", "jobs", words=3)
    for status in runs:
        stage = status.current or StageStatus("?", "?", 0, 0, 0, 0, 0)
        live = Counter(str(job["state"]).lower() for job in status.jobs if job.get("live"))
        table.add_row(
            status.run, stage.name, stage.state, f"{stage.tokens / max(1, stage.tokens_planned):.0%}",
            shown(stage.loss, ".3f"), shown(stage.tokens_per_s_per_gpu, ",.0f"),
            duration(status.seconds_left) if status.seconds_left else "",
            str(sum(status.restarts.values())), ", ".join(f"{n} {state}" for state, n in live.items()),
        )  # fmt: skip
    lines = [f"{escape(status.run)}: {escape(text)}" for status in runs for text in awaiting(status)]
    return Group(table, *lines, *unreachable(runs)) if runs else "no runs yet: smol launch starts one"


def awaiting(status: RunStatus) -> list[str]:
    """What a person has to do or to know for the run to go on."""
    reasons = [f"{stage.name} {stage.state}: {stage.reason}" for stage in status.stages if stage.reason]
    gate = status.next_gate or ""
    return reasons + [gate] * ("smol approve" in gate)


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
