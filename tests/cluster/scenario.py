"""Several stories on one cluster at a time: each waits most of the time, for nodes and for imports."""

from __future__ import annotations

import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass, field

from tests.cluster.runs import Live, Wait

Story = Generator[Wait, None, None]
PATIENCE = 600
"""Seconds: only a test that fails waits so long, whatever else this machine does."""


@dataclass
class Outcome:
    """How a story ended."""

    error: str | None = None
    """None if it went as it should."""
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By fault: until its cause was written down, and until the first step after the restart."""


def tell(stories: dict[str, Story], outcomes: dict[str, Outcome], at_once: int) -> None:
    """Lets the stories run side by side, `at_once` at a time; one that fails does not stop the others.

    One thread does it all: a daemon started by another thread would die with that.
    """
    waiting, active = dict(stories), dict[str, tuple[Wait, float]]()
    while waiting or active:
        while waiting and len(active) < at_once:
            name = next(iter(waiting))
            del waiting[name]
            _advance(name, stories[name], outcomes[name], active)
        for name, ((condition, seconds, what), began) in list(active.items()):
            try:
                done = condition()
                if not done and time.monotonic() - began > seconds:
                    stories[name].throw(TimeoutError(f"{what}: not within {seconds:g} s"))
            except Exception:
                outcomes[name].error = traceback.format_exc()
                del active[name]
                continue
            if done:
                _advance(name, stories[name], outcomes[name], active)
        time.sleep(0.1)


def _advance(name: str, story: Story, outcome: Outcome, active: dict[str, tuple[Wait, float]]) -> None:
    active.pop(name, None)
    try:
        active[name] = (next(story), time.monotonic())
    except StopIteration:
        return
    except Exception:
        outcome.error = traceback.format_exc()


@dataclass
class Fault:
    """One thing that goes wrong in a stage, and how long it takes to get over it."""

    run: Live
    stage: str
    name: str
    outcome: Outcome

    def later(self, steps: int = 15) -> Wait:
        """Until the stage has got on by so many steps: from here the fault hits the middle of it."""
        step = self.run.step(self.stage) + steps
        return lambda: self.run.step(self.stage) >= step, PATIENCE, f"{self.name}: step {step} of {self.stage}"

    def survive(self, cause: str) -> Story:
        """From the fault that was just done: its cause is written down, and training goes on."""
        began = time.monotonic()
        ends, starts = (len(self.run.events(kind, self.stage)) for kind in ("end", "start"))
        yield lambda: len(self.run.causes(self.stage)) > ends, PATIENCE, f"{self.name}: its end is recorded"
        assert self.run.causes(self.stage)[ends] == cause, self.run.events("end", self.stage)[ends]
        noted = time.monotonic() - began
        yield lambda: len(self.run.events("start", self.stage)) > starts, PATIENCE, f"{self.name}: started again"
        step = self.run.events("start", self.stage)[starts]["step"]
        yield lambda: self.run.step(self.stage) <= step, PATIENCE, f"{self.name}: later steps are taken back"
        yield lambda: self.run.step(self.stage) > step, PATIENCE, f"{self.name}: past step {step}"
        self.outcome.seconds[self.name] = (noted, time.monotonic() - began)


def finished(run: Live, stage: str) -> Wait:
    """Until the stage is complete."""
    return lambda: run.causes(stage)[-1:] == ["finished"], PATIENCE, f"{stage} is finished"
