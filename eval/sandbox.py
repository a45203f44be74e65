"""Runs a program that a model has written, in a process of its own, with little to break. Linux only.

The process has no network (a network namespace of its own) and sees none of this one's environment. It may write only
below its own temporary folder (Landlock; where the kernel has none, root becomes nobody). Time, memory, the size of
files and the number of open files are limited; when the time is up, every process below it is killed (a PID namespace
where one is allowed). It can still read whatever its user can read. Where the network cannot be taken away, or nothing
keeps it from writing elsewhere, nothing is run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import UserError

INSIDE = Path(__file__).resolve().with_name("sandbox_inside.py")
CANNOT = 3
"""The exit code of `INSIDE` where it cannot shut itself in."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    reason: str
    """"passed", "timeout", or the last line of what it printed on stderr."""


def run_code(program: str, seconds: float, memory: int) -> Outcome:
    """Runs a Python program; it has passed if it came to its end.

    Args:
        seconds: of wall-clock time, and of CPU time, rounded up.
        memory: bytes of address space.

    Raises:
        UserError: this machine offers no way to shut the program in.
    """
    token = secrets.token_hex(16)  # an early os._exit(0) does not print it
    with tempfile.TemporaryDirectory(prefix="sandbox-") as name:
        folder = Path(name)
        (folder / "program.py").write_text(f"{program}\nprint({token!r})\n", encoding="utf-8")
        folder.chmod(0o777)
        with open(folder / "out", "wb") as out_file, open(folder / "err", "wb") as error_file:
            process = subprocess.Popen(
                [sys.executable, "-I", str(INSIDE), name, str(seconds), str(memory)], cwd=name,
                env={}, stdin=subprocess.DEVNULL, stdout=out_file, stderr=error_file, start_new_session=True,
            )  # fmt: skip
        try:
            process.wait(seconds + 5)
            timed_out = process.returncode in (-signal.SIGKILL, 124, -signal.SIGXCPU)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out, error = ((folder / part).read_bytes()[-4000:].decode(errors="replace") for part in ("out", "err"))
    if process.returncode == CANNOT:
        raise UserError(f"programs cannot be shut in here ({error.strip()})", "run without humaneval on this machine")
    if token in out:
        return Outcome(True, "passed")
    lines = error.strip().splitlines() or [f"exit code {process.returncode}"]
    return Outcome(False, "timeout" if timed_out else lines[-1])
