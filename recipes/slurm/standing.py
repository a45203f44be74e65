"""How runs stand: from their files and from squeue alone.

Everything here may be half-written, absent or damaged: what cannot be read is left out. metrics.jsonl of a long run has
gigabytes: only its end, and a few lines in between for the picture, are read. Neither torch nor nanotron is imported.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from recipes.engine.checkpoint import MANIFEST
from recipes.errors import UserError
from recipes.run import RUN_FILE, runs_folder
from recipes.slurm import commands
from recipes.slurm.profile import FROZEN

TAIL_BYTES = 1 << 16
"""Of a file's end that is read: some 200 steps."""
RECENT_STEPS = 100
"""Over which the median rate is taken."""
POINTS = 24
"""Of the loss's picture."""
ACTIVE = ("starting", "training")
"""States in state.json of a stage that has a job."""
Json = dict[str, Any]
Answer = tuple[list[commands.Job], str | None]
"""Slurm's: the user's jobs, and why there are none if it could not be asked."""


@dataclass
class StageStatus:
    """How far a stage has come; none where nothing says it."""

    name: str
    state: str
    """waiting, or as in state.json: training, finished, stopped, failed, diverged, hung.

    interrupted: starting or training by its file, but no job of it is queued or running.
    """
    start_step: int
    end_step: int
    step: int
    """The last one trained; the stage's start if there is none."""
    tokens: int
    """Of this stage, so far."""
    tokens_planned: int
    loss: float | None = None
    lr: float | None = None
    tokens_per_s_per_gpu: float | None = None
    """Median over the last `RECENT_STEPS`."""
    mfu: float | None = None
    """Median, too."""
    step_seconds: float | None = None
    """Median, with data and checkpoints."""
    seconds_left: float | None = None
    """To the stage's end, at the median rate."""
    idle_seconds: float | None = None
    """Since its last step, by the clock of the file system: a stage that is alive has made one a moment ago."""
    losses: list[float] = field(default_factory=list)
    """At steps spread evenly over the stage so far."""
    reason: str | None = None
    """Why it ended, if it was not the stage's end."""


@dataclass
class RunStatus:
    """How a run stands."""

    run: str
    folder: Path
    recipe: str
    cluster: str | None
    gpus: int
    stages: list[StageStatus]
    jobs: list[Json]
    """squeue's and those of jobs.jsonl: `id`, `kind`, `stage`, `state`, `nodes`, `time_used`, `time_left`, `reason`."""
    slurm: str | None
    """Why squeue could not be asked; none if it answered."""
    restarts: dict[str, int]
    """How often a job went on by itself after its end, by that end's cause."""
    stops: dict[str, int]
    """How often it did not, before its stage was complete, by cause."""
    goodput: float | None
    """Productive time over allocated time, of training jobs."""
    seconds_left: float | None
    """To the end of the last stage of the main line, training only."""
    disk_bytes: int
    next_gate: str | None
    """What the next stage waits for."""
    upload: str | None
    """The last line that an upload has written."""

    @property
    def current(self) -> StageStatus | None:
        """The stage that is being trained, else the last that was, else the first."""
        begun = [stage for stage in self.stages if stage.state != "waiting"]
        return begun[-1] if begun else next(iter(self.stages), None)

    def as_dict(self) -> Json:
        """Plain data for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


# Reading, whatever state the files are in


def read_json(path: Path) -> Json:
    """A JSON mapping; empty if it is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def parse(line: bytes) -> Json | None:
    """A JSON line; none if it is torn."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def tail(path: Path, size: int = TAIL_BYTES) -> list[Json]:
    """The whole lines among the last `size` bytes of a file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return [content for line in lines if (content := parse(line)) is not None]


def spread(path: Path, key: str, count: int = POINTS) -> list[float]:
    """A key's numbers in `count` lines at even distances of a file, in order."""
    values: dict[int, float] = {}
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for i in range(count):
                file.seek(size * i // count)
                if i:
                    file.readline()
                place, content = file.tell(), parse(file.readline())
                if content and (value := number(content.get(key))) is not None:
                    values[place] = value
    except OSError:
        pass
    return [values[place] for place in sorted(values)]


def number(value: object) -> float | None:
    """`value` if it is a finite number."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    return float(value) if real and isinstance(value, (int, float)) else None


def whole(value: object) -> int:
    """`value` if it is a number; else 0."""
    return int(number(value) or 0)


def mappings(value: object) -> list[Json]:
    """The mappings of a list; none of anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def median(values: Sequence[object]) -> float | None:
    """Of those that are numbers; none of nothing."""
    known = [n for value in values if (n := number(value)) is not None]
    return statistics.median(known) if known else None


# What the files come to


def find(run: str) -> Path:
    """A run's folder by its path, or by its name below runs/.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(run), runs_folder() / run):
        if (folder / RUN_FILE).is_file():
            return folder.resolve()
    names = ", ".join(path.name for path in all_runs()[-8:])
    raise UserError(f"there is no run '{run}'", f"name one of: {names or '(no runs yet)'}", runs_folder())


def all_runs() -> list[Path]:
    """The runs below runs/, by name."""
    return sorted(path.parent.resolve() for path in runs_folder().glob(f"*/{RUN_FILE}"))


def ask_slurm() -> Answer:
    """The user's jobs that squeue knows, or why it could not be asked."""
    try:
        return commands.queue(), None
    except UserError as error:
        return [], error.found.partition("; ")[0]


def read_all() -> list[RunStatus]:
    """How all runs stand; Slurm is asked once, since it may take long not to answer."""
    answer = ask_slurm()
    return [read(folder, answer=answer) for folder in all_runs()]


def read(folder: Path, now: float | None = None, answer: Answer | None = None) -> RunStatus:
    """How a run stands; `answer` is Slurm's, if it has been asked already."""
    plan, events = read_json(folder / "plan.json"), tail(folder / "events.jsonl", 1 << 22)
    planned, branches = mappings(plan.get("stages")), mappings(plan.get("branches"))
    now = time.time() if now is None else now
    stages = [read_stage(folder, stage, plan, now) for stage in planned + branches]
    queue, problem = answer or ask_slurm()
    jobs = read_jobs(folder, queue) if problem is None else noted_jobs(folder)
    if problem is None and (folder / "jobs.jsonl").is_file():
        training = {job["stage"] for job in jobs if job["kind"] == "train" and job["live"]}
        for stage in (stage for stage in stages if stage.state in ACTIVE and stage.name not in training):
            stage.state = "interrupted"
    main, gpus = stages[: len(planned)], max(1, whole(plan.get("gpus")))
    ends = [e for e in events if e.get("event") == "end" and e.get("cause") != "finished"]
    stops, restarts = (Counter(str(e.get("cause")) for e in ends if (e.get("verdict") == "stop") is is_stop)
                       for is_stop in (True, False))  # fmt: skip
    return RunStatus(
        run=folder.name, folder=folder, recipe=str(read_json(folder / RUN_FILE).get("recipe", "?")),
        cluster=cluster_name(folder), gpus=gpus, stages=stages, jobs=jobs, slurm=problem,
        restarts=dict(restarts), stops=dict(stops),
        goodput=goodput(events, {s.name: s for s in stages}, now), seconds_left=run_left(main, gpus),
        disk_bytes=disk_use(folder), next_gate=next_gate(folder, main),
        upload=last_line(folder / "logs" / "upload.log"),
    )  # fmt: skip


def read_stage(folder: Path, planned: Json, plan: Json, now: float) -> StageStatus:
    """A stage's progress, from the end of its metrics and its state."""
    name, start, end = str(planned.get("name")), whole(planned.get("start_step")), whole(planned.get("end_step"))
    metrics = folder / name / "metrics.jsonl"
    lines = [line for line in tail(metrics) if number(line.get("step")) is not None]
    recent, state = lines[-RECENT_STEPS:], read_json(folder / name / "state.json")
    last = lines[-1] if lines else {}
    step = max(start, whole(last.get("step")), whole(state.get("step")))
    size, rate = whole(plan.get("tokens_per_step")), median([line.get("tokens_per_s") for line in recent])
    gpus, reason = max(1, whole(plan.get("gpus"))), state.get("reason")
    spans = [sum(filter(None, map(number, seconds.values()))) for line in recent
             if isinstance(seconds := line.get("seconds"), dict)]  # fmt: skip
    return StageStatus(
        name=name, state=str(state.get("state", "training" if lines else "waiting")), start_step=start, end_step=end,
        step=step, tokens=(step - start) * size, tokens_planned=(end - start) * size, loss=number(last.get("loss")),
        lr=number(last.get("lr")), mfu=median([line.get("mfu") for line in recent]),
        tokens_per_s_per_gpu=rate / gpus if rate else None,
        step_seconds=median(spans), seconds_left=(end - step) * size / rate if rate else None,
        losses=spread(metrics, "loss"), idle_seconds=max(0.0, now - changed) if (changed := mtime(metrics)) else None,
        reason=str(reason) if reason else None,
    )  # fmt: skip


def run_left(main: Sequence[StageStatus], gpus: int) -> float | None:
    """Seconds of training to the end of the last stage, at the rate of the newest stage that has one."""
    left = sum(stage.tokens_planned - stage.tokens for stage in main)
    rates = [stage.tokens_per_s_per_gpu for stage in main if stage.tokens_per_s_per_gpu]
    return left / (rates[-1] * gpus) if rates else None


def goodput(events: Sequence[Json], stages: dict[str, StageStatus], now: float) -> float | None:
    """Productive over allocated time: of the starts that have ended, and of the one that has not."""
    ends = [event for event in events if event.get("event") == "end"]
    allocated = sum(number(event.get("allocated_s")) or 0.0 for event in ends)
    productive = sum(number(event.get("productive_s")) or 0.0 for event in ends)
    last = next((e for e in reversed(events) if e.get("event") in ("start", "end")), {})
    stage = stages.get(str(last.get("stage")))
    began = seconds_of(last.get("time"))
    if last.get("event") == "start" and stage and began is not None and stage.state == "training":
        allocated += max(0.0, now - began)
        productive += max(0.0, stage.step - (number(last.get("step")) or stage.step)) * (stage.step_seconds or 0.0)
    return min(1.0, productive / allocated) if allocated else None


def seconds_of(value: object) -> float | None:
    """A time of events.jsonl in seconds since 1970: ISO 8601, or that already."""
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else number(value)
    except ValueError:
        return None


def mtime(path: Path) -> float | None:
    """When a file was last written to; none if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def disk_use(folder: Path) -> int:
    """Bytes of all files below a folder; of a checkpoint, which may have hundreds, its manifest's word is taken."""
    total = 0
    for where, folders, names in os.walk(folder):
        if MANIFEST in names and Path(where).parent.name == "checkpoints":
            total += sum(whole(file.get("bytes")) for file in mappings(read_json(Path(where) / MANIFEST).get("files")))
            folders.clear()
            continue
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size  # noqa: PTH118  a run has many files
            except OSError:
                continue  # gone meanwhile
    return total


def last_line(path: Path) -> str | None:
    """A text file's last line that is not empty."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def cluster_name(folder: Path) -> str | None:
    """The name of the frozen profile."""
    try:
        lines = (folder / FROZEN).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("name:")), None)


def next_gate(folder: Path, main: Sequence[StageStatus]) -> str | None:
    """What the next stage of the main line waits for, if a person has to open it."""
    for before, stage in pairwise(main):
        if stage.state != "waiting" or read_json(folder / "approvals" / f"{stage.name}.json"):
            continue
        if (folder / "proposals" / f"{stage.name}.yaml").is_file():
            command = f"smol approve {folder.name} {stage.name}"
            return f"{stage.name} waits for you: read proposals/{stage.name}.md, then {command}"
        return f"{stage.name}, once {before.name} is trained and a mixture is proposed"
    return None


def noted_jobs(folder: Path) -> list[Json]:
    """The jobs that were submitted, whatever has become of them."""
    return [{**line, "state": "?"} for line in tail(folder / "jobs.jsonl", 1 << 20)]


def read_jobs(folder: Path, queue: Sequence[commands.Job]) -> list[Json]:
    """The run's jobs among those of squeue."""
    noted = {line.get("id"): line for line in tail(folder / "jobs.jsonl", 1 << 20)}
    jobs = []
    for job in (job for job in queue if job.comment == str(folder.resolve())):
        line = noted.get(job.id, {})
        shown = {"id": f"{job.id}_{job.index}" if job.index else str(job.id), "name": job.name}
        place = {"kind": line.get("kind", "?"), "stage": line.get("stage", "?"), "nodes": job.nodes}
        jobs.append({**shown, **place, "state": job.state, "time_used": job.time_used, "time_left": job.time_left,
                     "reason": "" if job.reason == "None" else job.reason, "live": job.live})  # fmt: skip
    return jobs
