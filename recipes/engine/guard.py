"""Whether a step's loss is still sound: not a number, or a spike that stays. Neither torch nor nanotron.

A loss is a spike if it lies more than z robust standard deviations above the median of the window before it. The robust
standard deviation is 1.4826 × the median absolute deviation (Hampel 1974; 1.4826 makes it the standard deviation of a
normal distribution), and at least 1 % of the median: a model that has learned its data by heart has losses so even that
any change is many deviations.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from recipes.recipe import Guard

MAD_TO_DEVIATION = 1.4826
LEAST_DEVIATION = 0.01
"""Of the median. Chosen: batches of 2M tokens differ by about 1 % in loss."""


class Diverged(Exception):
    """Training went wrong at `step`, not through its machines: it would do so again."""

    def __init__(self, step: int, first_bad: int, reason: str) -> None:
        """`first_bad`: the first step of those that are not sound."""
        self.step, self.first_bad = step, first_bad
        super().__init__(reason)


class LossGuard:
    """Judges the losses of a stage, one step after the other; the same on every rank, as the losses are."""

    def __init__(self, settings: Guard) -> None:
        self.settings = settings
        self.spikes = 0
        """Spikes in a row up to the last step."""
        self._window: deque[float] = deque(maxlen=settings.window)

    @property
    def memory(self) -> int:
        """How many losses decide what `spikes` is: to go on as if undisturbed, `replay` as many."""
        return self.settings.window + self.settings.patience

    def replay(self, losses: Iterable[float]) -> None:
        """Takes in losses of steps that were judged before."""
        for loss in losses:
            self._take(loss)

    def judge(self, step: int, loss: float, grad_norm_is_finite: bool) -> None:
        """Takes in a step.

        Raises:
            Diverged: a number that is none, or the last of `patience` spikes in a row.
        """
        if not (math.isfinite(loss) and grad_norm_is_finite):
            what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradients' norm is not finite"
            raise Diverged(step, step, f"{what} at step {step:,}")
        score, middle = self._take(loss)
        patience = self.settings.patience
        if self.spikes >= patience:
            text = f"the loss is {loss:.4g} at step {step:,}, {score:.1f} robust standard deviations above the median "
            first = step - patience + 1
            raise Diverged(step, first, f"{text}of {middle:.4g}, and has been a spike since step {first:,}")

    def _take(self, loss: float) -> tuple[float, float]:
        """Counts the loss as a spike or not, and takes it into the window; returns its score and the median."""
        full = len(self._window) == self.settings.window
        score, middle = robust_score(loss, self._window) if full else (0.0, loss)
        self.spikes = self.spikes + 1 if score > self.settings.z else 0
        self._window.append(loss)
        return score, middle


def robust_score(loss: float, window: Iterable[float]) -> tuple[float, float]:
    """Robust standard deviations by which `loss` is above the median of `window`; and that median."""
    before = list(window)
    middle = median(before)
    deviation = MAD_TO_DEVIATION * median(abs(value - middle) for value in before)
    return (loss - middle) / max(deviation, LEAST_DEVIATION * abs(middle), 1e-12), middle
