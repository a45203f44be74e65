"""What a stage is doing: state.json, the exit codes of training, and the lock that lets one process train at a time.

Neither torch nor nanotron is imported here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from recipes.engine.checkpoint import steps
from recipes.errors import UserError
from recipes.files import write_json
from recipes.plan import StagePlan
from recipes.run import Run

EXIT_USER_ERROR, EXIT_NOT_WRITTEN, EXIT_STOPPED, EXIT_DIVERGED, EXIT_HUNG = 2, os.EX_IOERR, os.EX_TEMPFAIL, 76, 77
LOCK_SECONDS = 60
"""For which a start waits for an older one, which may be writing its last checkpoint."""


def end_with_parent() -> None:
    """Asks for SIGTERM when this process's parent dies: it may be killed, and then ends nobody."""
    set_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def write_state(
    run: Run, stage: str, state: str, step: int | None, exit_code: int | None = None, reason: str | None = None
) -> None:
    """Writes the stage's state.json, atomically; recipes/train.py says what it means."""
    content = {"stage": stage, "state": state, "step": step, "exit_code": exit_code, "reason": reason}
    try:
        write_json(run.stage_folder(stage) / "state.json", content)
    except OSError as error:
        print(f"state.json could not be written: {error}", file=sys.stderr, flush=True)


def read_state(run: Run, stage: str) -> dict[str, Any]:
    """The stage's state.json; empty if there is none."""
    path = run.stage_folder(stage) / "state.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def last_saved(run: Run, stage: StagePlan) -> int:
    """The last step that a checkpoint holds; the stage's start if there is none."""
    return max([stage.start_step, *steps(run.checkpoints(stage.name))])


def lock(folder: Path, seconds: int = LOCK_SECONDS) -> int | None:
    """Keeps other processes off the stage until this one ends, however it ends, or closes what is returned.

    Returns:
        A file descriptor; None on a file system without locks.

    Raises:
        UserError: another one has held it for so many seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    for attempt in range(seconds + 1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if attempt == 0 and seconds:
                print("another process trains this stage; waiting for it to end", flush=True)
            time.sleep(1 if attempt < seconds else 0)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            return None
    os.close(descriptor)
    raise UserError("another process trains this stage", "wait for it to end, or end it", folder)
