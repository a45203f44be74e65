"""What a program that a model wrote can and cannot do."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from eval.sandbox import run_code
from eval.sandbox_inside import FILE_BYTES

MEMORY = 256 << 20


def run(program: str, seconds: float = 3.0) -> str:
    """The reason why it did not pass, or "passed"."""
    outcome = run_code(program, seconds=seconds, memory=MEMORY)
    assert outcome.passed == (outcome.reason == "passed")
    return outcome.reason


def test_a_right_program_passes_and_a_wrong_one_does_not() -> None:
    assert run("def f(x):\n    return x + 1\nassert f(1) == 2") == "passed"
    assert "AssertionError" in run("def f(x):\n    return x\nassert f(1) == 2")
    assert "SyntaxError" in run("def f(x:")


@pytest.mark.parametrize("trick", ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit"])
def test_ending_early_is_not_passing(trick: str) -> None:
    assert run(f"{trick}\nassert False") != "passed"


def test_an_endless_loop_is_ended() -> None:
    began = time.monotonic()
    assert run("while True: pass", seconds=1) == "timeout"
    assert run("import time\ntime.sleep(60)", seconds=1) == "timeout"
    assert time.monotonic() - began < 20


def test_memory_is_limited() -> None:
    assert "MemoryError" in run("x = bytearray(1 << 30)")


def test_big_files_are_not_written() -> None:
    assert run(f"open('big', 'wb').write(bytes({4 * FILE_BYTES}))") != "passed"
    assert run("open('small', 'w').write('x')") == "passed"


def test_nothing_is_written_elsewhere(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    victim.chmod(0o666)
    assert "PermissionError" in run(f"open({str(victim)!r}, 'w').write('changed')")
    assert "PermissionError" in run(f"import os; os.remove({str(victim)!r})")
    assert "PermissionError" in run(f"open({str(tmp_path / 'new')!r}, 'w')")
    assert victim.read_text() == "as it was" and list(tmp_path.iterdir()) == [victim]


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        came: list[object] = []
        server.settimeout(3)
        accepting = threading.Thread(target=lambda: _accept(server, came))
        accepting.start()
        port = server.getsockname()[1]
        assert run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)") != "passed"
        accepting.join()
    assert not came


def _accept(server: socket.socket, came: list[object]) -> None:
    with contextlib.suppress(TimeoutError):
        came.append(server.accept())


def test_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run("import os; assert 'HF_TOKEN' not in os.environ") == "passed"


def test_processes_that_it_starts_end_with_it() -> None:
    mark = f"sandbox-orphan-{os.getpid()}"
    program = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', {mark!r}])"
    )
    run(program)
    time.sleep(0.3)
    running = [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _read(p)]
    assert not running


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
