from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from recipes.engine.watchdog import ALLOWANCE, EXIT_HUNG, Watchdog, dump_stacks
from recipes.recipe import Guard

QUICK = Guard(hang_seconds=0.4, hang_factor=10)


class Watched:
    """A watchdog whose bite is noted."""

    def __init__(self, settings: Guard = QUICK) -> None:
        self.problems: list[str] = []
        self.codes: list[int] = []
        self.bitten = threading.Event()
        self.dog = Watchdog(settings, self.problems.append, end=self._end)
        self.dog.start()

    def _end(self, code: int) -> None:
        self.codes.append(code)
        self.dog.stop()
        self.bitten.set()


def test_silence_after_a_step_ends_the_process_with_77() -> None:
    watched = Watched()
    watched.dog.beat(0.01)
    assert watched.bitten.wait(5)
    assert watched.codes == [EXIT_HUNG] and watched.problems == ["no step was finished in 0 seconds"]


def test_steps_keep_it_quiet_and_what_takes_longer_is_allowed_for() -> None:
    watched = Watched()
    time.sleep(0.6)  # the start
    for _ in range(5):
        watched.dog.beat(0.01)
        time.sleep(0.1)
    with watched.dog.during("checkpoint"):
        time.sleep(0.6)
    assert not watched.bitten.wait(0.1)
    watched.dog.stop()


def test_a_hang_inside_a_checkpoint_is_one_too() -> None:
    watched = Watched()
    watched.dog.beat(0.01)
    with watched.dog.during("checkpoint"):
        assert watched.bitten.wait(0.4 * ALLOWANCE + 3)
    assert "no checkpoint was finished" in watched.problems[0]


def test_the_limit_follows_the_median_step_without_the_first() -> None:
    dog = Watchdog(Guard(hang_seconds=5, hang_factor=10), print)
    assert dog.limit == 5 * ALLOWANCE
    dog.beat(100.0)
    assert dog.limit == 5
    for seconds in (1.0, 1.0, 2.0, 90.0, 1.5):
        dog.beat(seconds)
    assert dog.limit == 15
    with dog.during("checkpoint"):
        assert dog.limit == 5 * ALLOWANCE
    assert dog.limit == 15


def test_the_process_ends_even_if_the_hang_cannot_be_written_down(capsys: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    dog = Watchdog(QUICK, lambda _: 1 / 0, end=lambda _: (dog.stop(), ended.set()))
    dog.beat(0.01)
    dog.start()
    assert ended.wait(5)
    assert capsys.readouterr().err == "the hang could not be written down: division by zero\n"


def test_the_process_ends_even_if_writing_it_down_hangs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.engine.watchdog.NOTE_SECONDS", 0.2)
    ended, never = threading.Event(), threading.Event()
    dog = Watchdog(QUICK, lambda _: never.wait(10), end=lambda _: (dog.stop(), ended.set()))
    dog.beat(0.01)
    dog.start()
    assert ended.wait(5)
    never.set()


@pytest.mark.slow
def test_a_process_that_was_suspended_has_not_hung() -> None:
    code = """
import time
from recipes.engine.watchdog import Watchdog
from recipes.recipe import Guard
dog = Watchdog(Guard(hang_seconds=0.5), print)
dog.start()
print("go", flush=True)
for _ in range(40):
    dog.beat(0.01)
    time.sleep(0.05)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=20)[0] == "" and process.returncode == 0


def test_stacks_name_every_thread_and_where_it_stands(tmp_path: Path) -> None:
    wait = threading.Event()

    def sleeper_of_this_test() -> None:
        wait.wait(5)

    thread = threading.Thread(target=sleeper_of_this_test)
    thread.start()
    path = dump_stacks(tmp_path / "logs", 3)
    wait.set()
    thread.join()
    assert re.fullmatch(r"stacks-3-\d{8}T\d{6}\.txt", path.name)
    assert "sleeper_of_this_test" in path.read_text() and "test_stacks_name_every_thread" in path.read_text()
