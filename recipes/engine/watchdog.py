"""Ends a process that makes no step any more, after writing down where every thread stands. Not torch, not nanotron.

A rank that is stopped or lost cannot end itself: the others wait for it in a collective, and their watchdogs do it;
torchrun then kills the rest of its node (SIGTERM, and SIGKILL 30 seconds later), and srun the other nodes.
A thread that holds Python's lock for ever inside a C function also stops this thread: then, too, the others act.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from recipes.recipe import Guard

EXIT_HUNG = 77
ALLOWANCE = 6
"""Times `hang_seconds` that the start, a checkpoint and a held-out evaluation may take. Chosen: 30 minutes at 300 s."""
KEPT = 101
"""Steps whose median is taken."""
NOTE_SECONDS = 20.0
"""For which the end waits for `on_hang`: what hangs may be the very disk it writes to."""
LOOKS = 20
"""Looks at the clock in `hang_seconds`, at least one a second."""


class Watchdog:
    """A thread that calls `on_hang` and ends the process when no step has been done for too long."""

    def __init__(self, settings: Guard, on_hang: Callable[[str], None], *, end: Callable[[int], None] = os._exit):
        """`on_hang` gets one line that says what was waited for; whatever it does, the process ends with 77."""
        self.settings, self.on_hang, self.end = settings, on_hang, end
        self._seconds: deque[float] = deque(maxlen=KEPT)
        self._doing = "start"
        self._begun = False
        self._silent = 0.0
        self._done = threading.Event()

    def start(self) -> None:
        """Watches from now on."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watches no more."""
        self._done.set()

    def beat(self, seconds: float) -> None:
        """A step was done, in so many seconds; the first one, with its warm-up, is not counted in."""
        if self._begun:
            self._seconds.append(seconds)
        self._begun, self._doing, self._silent = True, "step", 0.0

    @contextmanager
    def during(self, work: str) -> Iterator[None]:
        """Allows for work that takes longer than a step."""
        before, self._doing, self._silent = self._doing, work, 0.0
        try:
            yield
        finally:
            self._doing, self._silent = before, 0.0

    @property
    def limit(self) -> float:
        """Seconds that what is being done may take."""
        step = self.settings.hang_factor * median(self._seconds) if self._seconds else 0.0
        allowance = 1 if self._doing == "step" else ALLOWANCE
        return max(self.settings.hang_seconds * allowance, step)

    def _watch(self) -> None:
        pause = min(1.0, self.settings.hang_seconds / LOOKS)
        before = time.monotonic()
        while not self._done.wait(pause):
            now = time.monotonic()
            self._silent += min(now - before, 2 * pause)  # a process that was itself suspended has not hung
            before = now
            if self._silent > (limit := self.limit):
                problem = f"no {self._doing} was finished in {limit:,.0f} seconds"
                note = threading.Thread(target=self._note, args=(problem,), daemon=True)
                note.start()
                note.join(NOTE_SECONDS)
                self.end(EXIT_HUNG)

    def _note(self, problem: str) -> None:
        try:
            self.on_hang(problem)
        except Exception as error:
            print(f"the hang could not be written down: {error}", file=sys.stderr, flush=True)


def dump_stacks(folder: Path, rank: int) -> Path:
    """Writes where each of this process's threads stands to stacks-<rank>-<time>.txt in `folder`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"stacks-{rank}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.txt"
    with open(path, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    return path
