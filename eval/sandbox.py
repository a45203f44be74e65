"""Runs a program that a model has written, in a process of its own, with little to break. Linux only.

The process has no network, sees none of this one's environment, and can neither write a file nor start a process.
Time, memory and output are limited. eval/sandbox_inside.py says by what; where one of its means is missing, nothing is
run. The program can still read what its user can read. A program that means to cheat can: its test runs in the same
Python, so it could call itself passed.
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

from eval.sandbox_inside import CANNOT, TIMEOUT
from recipes.errors import UserError

INSIDE = Path(__file__).resolve().with_name("sandbox_inside.py")
FIX = "run without humaneval on this machine"
CODE_SECONDS = 10.0
CODE_BYTES = 1 << 30
"""What a program of HumanEval gets. chosen: far more than a right one needs."""


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
        with open(folder / "out", "wb") as out_file, open(folder / "err", "wb") as error_file:
            process = subprocess.Popen(
                [sys.executable, "-I", str(INSIDE), name, str(seconds), str(memory)], cwd=name,
                env={}, stdin=subprocess.DEVNULL, stdout=out_file, stderr=error_file, start_new_session=True,
            )  # fmt: skip
        try:
            code = process.wait(seconds + 5)
        except subprocess.TimeoutExpired:
            code = TIMEOUT
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out, error = ((folder / part).read_bytes()[-4000:].decode(errors="replace") for part in ("out", "err"))
    if code == CANNOT:
        raise UserError(f"programs cannot be shut in here ({error.strip()})", FIX)
    if token in out:
        return Outcome(True, "passed")
    lines = error.strip().splitlines() or [f"exit code {code}"]
    return Outcome(False, "timeout" if code == TIMEOUT else lines[-1])


def check_sandbox(memory: int = CODE_BYTES) -> None:
    """Raises UserError if a program that does nothing does not pass: a model's programs would all seem wrong."""
    outcome = run_code("pass", CODE_SECONDS, memory)
    if not outcome.passed:
        raise UserError(f"no program runs in the sandbox ({outcome.reason})", FIX)
