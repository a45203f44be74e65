"""What slurm/train.slurm asks before training starts and after it has ended: may it start, and is it to go on?

    python -m recipes.slurm.restart begin RUN STAGE
    python -m recipes.slurm.restart end RUN STAGE --code RC --signal NAME

`begin` records the start in events.jsonl. Exit code 0: train; 1: it has failed too often; 3: the stage may not start.
`end` records the cause of the end, prints one line, and ends with 0: the stage is complete; 10: requeue; 1: stop.
RC is the exit code of srun, or the preflight's; NAME what the script was sent, none, USR1 (the time limit is near, or
has come), TERM (preempted) or CANCEL (Slurm is ending the job). `--few WORDS` says that too few nodes are fit: it
stops. $LOOK is the preflight's folder, where it says which nodes are bad. What ended is read from state.json and the
checkpoints, since torchrun's own exit code is 1 whatever its workers return.

A stage is tried again until it has failed four times, the first try and three restarts, without a new checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from recipes.errors import UserError
from recipes.files import append_line, read_lines
from recipes.plan import StagePlan
from recipes.run import Run
from recipes.slurm import gate
from recipes.state import last_saved, read_state, write_state

COMPLETE, STOP, MAY_NOT_START, REQUEUE = 0, 1, 3, 10
CODE_BAD_NODE = 3
"""The preflight's."""
RESTARTS = 3
"""After failures without a new checkpoint; chosen."""
FAILURES = frozenset({"crash", "node-failure", "hang", "time-limit"})
"""Causes that count against RESTARTS: a time limit, too, is one when no checkpoint was reached since the last. And a
bad node, when it comes back."""
STOPPING = frozenset({"diverged", "disk-full", "user-error", "cancelled"})
"""Causes that would only come back."""
KILLED = re.compile(r"^.*(oom[_-]kill event.*|Signal (?!15\b)\d+ \(SIG\w+\) received by PID \d+.*)$", re.MULTILINE)
ERROR = re.compile(r"^(?:\[?rank ?\d+\]?:\s*)?((?:\w+\.)*(?!ChildFailed)\w*(?:Error|Exception)\b: .+)$", re.MULTILINE)
LOG_BYTES, LINE = 1 << 20, 300
"""Of a log's end that is searched for them; and letters of what is found."""
SIGNALS = {"USR1": "time-limit", "TERM": "preempted", "CANCEL": "cancelled"}
Event = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether a stage goes on, and the sentence that says why."""

    code: int
    text: str


# Decisions: of plain data alone


def cause_of(state: Event, complete: bool, code: int, signal: str, log: str = "") -> tuple[str, str]:
    """Why training ended, as events.jsonl names it, and a detail of one line.

    Args:
        state: state.json: "starting" if training has not got as far as to write it.
        complete: the checkpoint of the stage's last step is there.
        log: what was printed since the start; a process that is killed, or fails early, says it only there.
    """
    what, reason = state.get("state"), first_line(state.get("reason"))
    reason = reason or error_in(log) or f"ended with exit code {code}"
    if what == "finished" and complete:
        return "finished", ""
    if code == CODE_BAD_NODE and what in (None, "starting"):
        return "bad-node", bad_nodes() or "the preflight found a bad node"
    if what == "diverged":
        return "diverged", reason
    if what == "hung":
        return "hang", reason
    if what == "failed" and state.get("exit_code") == 2:
        return "user-error", reason
    if what == "failed" and state.get("exit_code") == 74:
        return "disk-full", reason
    if signal in SIGNALS:
        return SIGNALS[signal], reason if what == "stopped" else f"no checkpoint was written in time: {reason}"
    if what == "stopped":  # Slurm sends a preempted job's SIGTERM to its steps only
        return "preempted", f"stopped by {reason}"
    killed = KILLED.search(log)
    return "crash", killed[1] if killed else reason


def error_in(log: str) -> str:
    """The first error that a log shows: the later ones mostly follow from it."""
    found = KILLED.search(log) or ERROR.search(log)
    return found[1][:LINE] if found else ""


def failures(events: Sequence[Event], stage: str, step: int) -> list[Event]:
    """The failures of a stage since its newest checkpoint, of `step`, or since it was stopped and started again."""
    counted: list[Event] = []
    for event in events:
        if event.get("stage") != stage:
            continue
        if event["event"] == "rollback" or event.get("verdict") == "stop":
            counted.clear()
        elif event["event"] == "end" and (event["cause"] in FAILURES or came_back(event, events)):
            counted.append(event)
    return [event for event in counted if event["step"] == step and event["from_step"] == step]


def came_back(event: Event, events: Sequence[Event]) -> bool:
    """Whether a bad node was found again: Slurm has not excluded it."""
    if event["cause"] != "bad-node":
        return False
    first = event["detail"].partition(":")[0]
    found = [e for e in events if e.get("cause") == "bad-node" and e["detail"].partition(":")[0] == first]
    return found[0] is not event


def verdict(cause: str, detail: str, failed: Sequence[Event], step: int, few: str = "") -> Verdict:
    """What follows from an end, `failed` including it; `few` says that there are no nodes to start again on."""
    if cause == "finished":
        return Verdict(COMPLETE, f"finished at step {step:,}")
    if few:
        return Verdict(STOP, f"{cause} at step {step:,}; stopped: {few}: {detail}")
    if cause in STOPPING:
        return Verdict(STOP, f"{cause} at step {step:,}; stopped: {detail}")
    if len(failed) > RESTARTS:
        found = f"failed {len(failed)} times without a checkpoint after step {step:,}"
        return Verdict(STOP, f"{found}; stopped. The last error: {cause}: {detail}")
    tries = f", restart {len(failed)} of {RESTARTS} without a new checkpoint" if failed else ""
    return Verdict(REQUEUE, f"{cause} at step {step:,}; requeued{tries}: {detail}")


def bad_nodes() -> str:
    """The nodes that the preflight of this start has found, with its reasons, on one line."""
    path = Path(os.environ.get("LOOK", "")) / "reasons"
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return "; ".join(f"{node}: {reason}" for node, reason in found.items())


def first_line(text: str | None) -> str:
    """A message's first line that is not empty."""
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "")


def open_start(events: Sequence[Event], stage: str) -> Event | None:
    """The stage's last start, if its end was not recorded."""
    mine = [e for e in events if e.get("stage") == stage and e["event"] in ("start", "end")]
    return mine[-1] if mine and mine[-1]["event"] == "start" else None


def productive_seconds(metrics: Sequence[Event], start_step: int, saved: int) -> float:
    """Seconds of the steps after `start_step` that the checkpoint of step `saved` holds; checkpoints not counted."""
    seconds = (line["seconds"] for line in metrics if start_step < line["step"] <= saved)
    return float(sum(s["data"] + s["step"] for s in seconds))


# What the script asks


def begin(folder: Path, stage: str) -> int:
    """Records a start, and the end of the one before if nothing did; returns the exit code."""
    try:
        gate.check(folder, stage)
        run = Run.load(folder)
        run.recipe.stage(stage)
    except UserError as error:
        print(f"{stage} may not start: {error}", flush=True)
        return MAY_NOT_START
    plan = run.plan.stage(stage)
    missing = open_start(_events(run), stage)
    if missing is not None:
        text = f"job {missing['job']} was ended from outside, without a word"
        answer = _record_end(run, plan, missing, "node-failure", text, _last_sign(run, stage))
        print(f"{stage}: {answer.text}", flush=True)
        if answer.code == STOP:
            return STOP
    attempt = 1 + sum(e["event"] == "start" and e["stage"] == stage for e in _events(run))
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    step = last_saved(run, plan)
    event = {"event": "start", "stage": stage, "job": int(job) if job else None, "restart": restart, "step": step}
    append_line(run.folder / "events.jsonl", {**event, "time": _text(_now())}, sync=True)
    write_state(run, stage, "starting", step)
    print(f"{stage}: attempt {attempt}, after step {step:,} of {plan.end_step:,}", flush=True)
    return 0


def end(folder: Path, stage: str, code: int, signal: str, few: str = "") -> int:
    """Records an end and its cause; prints one line and returns the exit code.

    Args:
        few: that too few nodes are fit to start again on, in words.
    """
    try:
        run = Run.load(folder)
        run.recipe.stage(stage)
    except UserError as error:
        print(f"{stage}: stopped: {first_line(str(error))}", flush=True)
        return STOP
    plan, state = run.plan.stage(stage), read_state(run, stage)
    started = open_start(_events(run), stage)
    if started is None:
        print(f"{stage}: stopped: its start was not recorded (python -m recipes.slurm.restart begin)", flush=True)
        return STOP
    saved = last_saved(run, plan)
    cause, detail = cause_of(state, saved == plan.end_step, code, signal, _log(run, stage, started))
    answer = _record_end(run, plan, started, cause, detail, _now(), few)
    print(f"{stage}: {answer.text}", flush=True)
    if answer.code == STOP and state.get("state") in (None, "starting", "training"):  # for `smol status`
        write_state(run, stage, "stopped" if cause == "cancelled" else "failed", saved, code, answer.text)
    return answer.code


def _record_end(
    run: Run, stage: StagePlan, started: Event, cause: str, detail: str, when: datetime, few: str = ""
) -> Verdict:
    """Writes the "end" event that belongs to a start."""
    step = last_saved(run, stage)
    metrics = read_lines(run.stage_folder(stage.name) / "metrics.jsonl")
    event = {
        "event": "end", "stage": stage.name, "job": started["job"], "cause": cause, "step": step,
        "from_step": started["step"], "detail": detail, "time": _text(when),
        "allocated_s": round(max(0.0, (when - datetime.fromisoformat(started["time"])).total_seconds()), 3),
        "productive_s": round(productive_seconds(metrics, started["step"], step), 3),
    }  # fmt: skip
    answer = verdict(cause, detail, failures([*_events(run), event], stage.name, step), step, few)
    words = {COMPLETE: "complete", STOP: "stop", REQUEUE: "requeue"}
    append_line(run.folder / "events.jsonl", {**event, "verdict": words[answer.code]}, sync=True)
    return answer


def _log(run: Run, stage: str, started: Event) -> str:
    """What the job's log holds since its last start; nothing if it is not where `smol launch` puts it."""
    path = run.stage_folder(stage) / "logs" / f"train-{started['job']}.log"
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
        return file.read().decode(errors="replace").rpartition("\n== ")[2]


def _last_sign(run: Run, stage: str) -> datetime:
    """When the stage's files were last written to: until then its processes were alive."""
    folder = run.stage_folder(stage)
    paths = [folder / "metrics.jsonl", folder / "state.json", run.checkpoints(stage)]
    seen = [path.stat().st_mtime for path in paths if path.exists()]
    return datetime.fromtimestamp(max(seen), timezone.utc) if seen else _now()


def _events(run: Run) -> list[Event]:
    return read_lines(run.folder / "events.jsonl")


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _text(when: datetime) -> str:
    return when.isoformat(timespec="milliseconds")


def main(arguments: list[str] | None = None) -> int:
    """Answers one question; see the top of this file."""
    parser = argparse.ArgumentParser(prog="recipes.slurm.restart", description="What a job script asks about a stage.")
    parser.add_argument("question", choices=["begin", "end"])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("stage")
    parser.add_argument("--code", type=int, default=1, help="exit code of srun")
    parser.add_argument("--signal", default="none", choices=["none", *SIGNALS], help="what the script was sent")
    parser.add_argument("--few", default="", help="that too few nodes are fit, in words")
    given = parser.parse_args(arguments)
    if given.question == "begin":
        return begin(given.run, given.stage)
    return end(given.run, given.stage, given.code, given.signal, given.few)


if __name__ == "__main__":
    sys.exit(main())
