"""Going back to a checkpoint after training went wrong, and leaving out the data that it went wrong on.

Nothing is deleted: the checkpoints after the step are renamed to `<step>.rolled-back`, which nothing reads. The next
start takes the lines of later steps out of metrics and ledger, as after every restart.
"""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path

from recipes.engine.checkpoint import Checkpoint, steps
from recipes.errors import UserError
from recipes.files import append_line, sync_folder
from recipes.plan import StagePlan
from recipes.run import Run
from recipes.skips import Skip, read_skips, write_skips
from recipes.state import lock, write_state

ROLLED_BACK = ".rolled-back"
"""Suffix of checkpoints that training went back behind."""


def rollback(run: Run, stage: str, to_step: int, skip_tokens: int = 0) -> list[Path]:
    """Makes the checkpoint of `to_step` the one that the stage goes on from.

    Run again after a kill, it does the rest. Of several calls for one step the last one's `skip_tokens` counts.

    Args:
        to_step: a step with a checkpoint, or the stage's start.
        skip_tokens: of the data that follows the step, to be left out; rounded up to whole steps.

    Returns:
        The checkpoints set aside, under their new names.

    Raises:
        UserError: no such checkpoint, or a damaged one; a later stage has begun; the stage is being trained.
    """
    run.recipe.stage(stage)
    plan = run.plan.stage(stage)
    check_step(run, plan, to_step, skip_tokens)
    held = lock(run.stage_folder(stage), seconds=0)
    try:
        return _roll_back(run, plan, to_step, -(-skip_tokens // run.plan.tokens_per_step))
    finally:
        if held is not None:
            os.close(held)


def check_step(run: Run, stage: StagePlan, to_step: int, skip_tokens: int) -> None:
    """Raises UserError if the stage cannot go back to that step, or leave out so much behind it."""
    folder = run.checkpoints(stage.name)
    if to_step != stage.start_step:
        if to_step not in steps(folder):
            there = ", ".join(f"{step}" for step in (stage.start_step, *steps(folder)))
            raise UserError(f"{stage.name} has no checkpoint of step {to_step:,}", f"name one of {there}", folder)
        Checkpoint.load(folder / str(to_step)).verify()
    if not 0 <= skip_tokens < stage.tokens:
        found = f"{skip_tokens:,} tokens are to be left out of a stage of {stage.tokens:,}"
        raise UserError(found, "name fewer, and none below 0")
    if to_step == stage.end_step and skip_tokens:
        raise UserError(f"{stage.name} ends at step {to_step:,}", "name an earlier step: no data follows this one")
    names = [s.name for s in run.plan.stages]
    later = names[names.index(stage.name) + 1 :] if stage.name in names else []
    leaving = [b.name for b in run.plan.branches if b.branch == stage.name and b.start_step > to_step]
    if begun := [name for name in (*later, *leaving) if run.has_begun(name)]:
        found = f"{begun[0]} has begun, from weights that would be undone"
        raise UserError(found, f"go back inside {begun[0]}, or start a new run", run.stage_folder(begun[0]))


def _roll_back(run: Run, stage: StagePlan, to_step: int, skipped_steps: int) -> list[Path]:
    """Newest first, so that a kill in between leaves a stage that goes on from an earlier checkpoint."""
    folder, aside = run.checkpoints(stage.name), []
    for step in reversed([step for step in steps(folder) if step > to_step]):
        aside.append((folder / str(step)).rename(_free_name(folder, step)))
    if aside:
        sync_folder(folder)
    samples = skipped_steps * stage.samples_per_step
    skips = [skip for skip in read_skips(run, stage.name) if skip.after_step < to_step]
    write_skips(run, stage.name, [*skips, Skip(stage.name, to_step, samples)] if samples else skips)
    write_state(run, stage.name, "stopped", to_step, reason=f"rolled back to step {to_step}")
    event = {"event": "rollback", "stage": stage.name, "to_step": to_step,
             "skip_tokens": skipped_steps * run.plan.tokens_per_step, "samples": samples,
             "set_aside": [path.name for path in aside],
             "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}  # fmt: skip
    append_line(run.folder / "events.jsonl", event, sync=True)
    return aside


def _free_name(folder: Path, step: int) -> Path:
    names = (folder / f"{step}{ROLLED_BACK}{f'-{n}' if n > 1 else ''}" for n in range(1, 10_000))
    return next(path for path in names if not path.exists())
