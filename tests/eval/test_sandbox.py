"""What a program that a model wrote can and cannot do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.sandbox import INSIDE, check_sandbox, run_code
from eval.sandbox_inside import FILE_BYTES, TIMEOUT
from eval.worker import main
from recipes.errors import UserError
from tests.eval.fixtures import write_datasets

MEMORY = 256 << 20
ROOT = Path(__file__).resolve().parent.parent.parent


def run(program: str, seconds: float = 3.0) -> str:
    """The reason why it did not pass, or "passed"."""
    outcome = run_code(program, seconds=seconds, memory=MEMORY)
    assert outcome.passed == (outcome.reason == "passed")
    return outcome.reason


def test_a_right_program_passes_and_a_wrong_one_does_not() -> None:
    assert run("def f(x):\n    return x + 1\nassert f(1) == 2") == "passed"
    assert "AssertionError" in run("def f(x):\n    return x\nassert f(1) == 2")
    assert "SyntaxError" in run("def f(x:")


@pytest.mark.parametrize("trick", ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit", "exit(3)"])
def test_ending_early_is_not_passing(trick: str) -> None:
    assert run(f"{trick}\nassert False") != "passed"


def test_an_endless_loop_is_ended() -> None:
    began = time.monotonic()
    assert run("while True: pass", seconds=1) == "timeout"
    assert run("import time\ntime.sleep(60)", seconds=1) == "timeout"
    assert time.monotonic() - began < 20


def test_an_endless_loop_ends_without_anyone_outside(tmp_path: Path) -> None:
    """The evaluation may be killed in the meantime."""
    (tmp_path / "program.py").write_text("while True: pass")
    command = [sys.executable, "-I", str(INSIDE), str(tmp_path), "0.5", str(MEMORY)]
    assert subprocess.run(command, timeout=60).returncode == TIMEOUT


def test_memory_is_limited() -> None:
    assert "MemoryError" in run("x = bytearray(1 << 30)")


def test_output_is_limited() -> None:
    assert "File too large" in run(f"print('x' * {4 * FILE_BYTES})")


@pytest.mark.parametrize(
    "change",
    ["open({!r}, 'w')", "os.remove({!r})", "os.truncate({!r}, 0)", "os.chmod({!r}, 0)", "os.utime({!r}, (0, 0))",
     "open({!r} + '.new', 'w')", "open('own', 'w')", "open('/dev/shm/own', 'w')"],
)  # fmt: skip
def test_nothing_is_written_or_changed(change: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    before = victim.stat()
    said = run("import os\n" + change.format(str(victim)))
    assert "Read-only file system" in said or "Permission denied" in said
    assert victim.read_text() == "as it was" and list(tmp_path.iterdir()) == [victim]
    assert (victim.stat().st_mode, victim.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_landlock_alone_forbids_writing(tmp_path: Path) -> None:
    """What is left where mounts cannot be made read-only."""
    (tmp_path / "victim").write_text("as it was")
    program = f"""
import ctypes, os
from eval.sandbox_inside import forbid_writes
assert forbid_writes(ctypes.CDLL(None))
os.chdir({str(tmp_path)!r})
for what in (lambda: open("victim", "w"), lambda: open("new", "w"), lambda: os.remove("victim"),
             lambda: os.truncate("victim", 0), lambda: os.open("victim", os.O_RDONLY | os.O_TRUNC)):
    try:
        what()
    except PermissionError:
        continue
    raise SystemExit("allowed")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "victim").read_text() == "as it was"


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX"])
def test_there_is_no_network_nor_a_local_socket(family: str) -> None:
    assert "Operation not permitted" in run(f"import socket; socket.socket(socket.{family})")


def test_the_network_is_gone_without_seccomp_too() -> None:
    assert run("assert [line.split(':')[0].strip() for line in open('/proc/net/dev')][2:] == ['lo']") == "passed"


@pytest.mark.parametrize(
    "start", ["os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "threading.Thread().start()"]
)
def test_no_process_and_no_thread_is_started(start: str) -> None:
    said = run(f"import os, threading; {start}")
    assert "Operation not permitted" in said or "can't start new thread" in said


def test_no_process_of_others_is_reached() -> None:
    assert "No such process" in run(f"import os; os.kill({os.getpid()}, 0)")
    program = f"open('/proc/{os.getpid()}/environ').read()"
    assert "Permission denied" in run(program)


def test_root_has_no_power_left() -> None:
    assert "Operation not permitted" in run("import socket; socket.sethostname(socket.gethostname())")
    assert run("assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()") == "passed"


def test_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run("import os; assert 'HF_TOKEN' not in os.environ") == "passed"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"os.uname().machine": "'abacus'"}, "system calls of abacus are unknown"),
        ({"return not libc.syscall": "return 0 and libc.syscall", "return ruleset": "return 0 and ruleset"},
         "no read-only mounts, and no Landlock"),
        ({"libc.unshare(": "libc.syscall(-1, "}, "no namespaces"),
    ],
)  # fmt: skip
def test_where_something_is_missing_nothing_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    text = INSIDE.read_text()
    for here, there in changes.items():
        assert here in text
        text = text.replace(here, there)
    (tmp_path / "inside.py").write_text(text)
    monkeypatch.setattr("eval.sandbox.INSIDE", tmp_path / "inside.py")
    with pytest.raises(UserError, match=f"cannot be shut in here .*{said}"):
        run("pass")


def test_the_sandbox_is_tried_before_anything_is_evaluated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inside.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr("eval.sandbox.INSIDE", tmp_path / "inside.py")
    data = write_datasets(tmp_path / "data")
    arguments = ["--model", "none", "--benchmark", "humaneval", "--out", "none", "--data-root", str(data)]
    assert main([*arguments, "--allow-code"]) == 2
    assert "no program runs in the sandbox (exit code 1). Run without humaneval" in capsys.readouterr().err


def test_a_sandbox_in_which_nothing_runs_is_told_from_wrong_programs() -> None:
    check_sandbox(MEMORY)
    with pytest.raises(UserError, match="no program runs in the sandbox"):
        check_sandbox(1 << 20)
