from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from recipes.engine.guard import Diverged, LossGuard, robust_score
from recipes.recipe import Guard

SMALL = Guard(window=8, z=5, patience=3)


def stopped_at(guard: LossGuard, losses: list[float], first: int = 1) -> tuple[int, int] | None:
    """The step at which the guard stops, and the first bad one."""
    for step, loss in enumerate(losses, first):
        try:
            guard.judge(step, loss, True)
        except Diverged as error:
            return error.step, error.first_bad
    return None


def test_a_rise_that_stays_stops_after_patience_steps() -> None:
    losses = [2.0, 2.1] * 10 + [9.0] * 5
    assert stopped_at(LossGuard(SMALL), losses) == (23, 21)


@pytest.mark.parametrize(
    "losses",
    [
        [2.0, 2.1] * 10 + [9.0] * 2 + [2.0, 9.0, 9.0, 2.1],
        [9.0] * 20 + [2.0] * 20,
        [2.0, 2.1] * 3 + [9.0] * 30,
        [2.0] * 20 + [2.05] * 20,
        [float(x) for x in np.linspace(2, 3, 200)],
    ],
    ids=["short", "falls", "before the window is full", "within 5 times 1 %", "creeps"],
)
def test_what_is_no_lasting_spike_does_not_stop(losses: list[float]) -> None:
    assert stopped_at(LossGuard(SMALL), losses) is None


def test_the_default_has_no_false_alarm_in_noise_and_survives_a_spike_that_passes() -> None:
    rng = np.random.default_rng(1)
    losses = 2.0 + 0.03 * rng.standard_normal(5000)
    losses[2000:2060] += 3 * np.exp(-np.arange(60) / 20)
    assert stopped_at(LossGuard(Guard()), losses.tolist()) is None
    losses[3000:] += 1.0
    assert stopped_at(LossGuard(Guard()), losses.tolist()) == (3064, 3001)


@pytest.mark.parametrize(("loss", "finite"), [(math.nan, True), (math.inf, True), (-math.inf, True), (2.0, False)])
def test_a_number_that_is_none_stops_at_once(loss: float, finite: bool) -> None:
    with pytest.raises(Diverged, match="at step 1,007") as raised:
        LossGuard(Guard()).judge(1007, loss, finite)
    assert raised.value.first_bad == 1007


@example(stretches=[(2.0, 12), (9.0, 5)], cut=13)
@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 2.05, 9.0]), st.integers(1, 9)), max_size=12), st.integers(0, 60))
def test_a_guard_that_replays_its_memory_goes_on_as_if_undisturbed(
    stretches: list[tuple[float, int]], cut: int
) -> None:
    losses = [loss for loss, length in stretches for _ in range(length)]
    end = stopped_at(LossGuard(SMALL), losses)
    cut = min(cut, len(losses), (end[0] - 1) if end else len(losses))
    resumed = LossGuard(SMALL)
    resumed.replay(losses[:cut][-resumed.memory :])
    assert stopped_at(resumed, losses[cut:], cut + 1) == end


@given(st.lists(st.floats(0.5, 10), min_size=3, max_size=20), st.floats(0.1, 10))
def test_the_score_grows_with_the_loss_and_is_0_at_the_median(window: list[float], scale: float) -> None:
    _, middle = robust_score(1.0, window)
    assert robust_score(middle, window)[0] == 0
    scores = [robust_score(middle + scale * n, window)[0] for n in range(4)]
    assert all(a < b for a, b in pairwise(scores))


def test_patience_must_fit_the_window() -> None:
    with pytest.raises(ValueError, match="at most half the window, 10"):
        Guard(window=20, patience=11)
