"""For tests only: makes a rank write NaN, or all of them slow. All else that can go wrong is done from outside.

RECIPES_TEST_FAULT="nan:step=7:rank=1" makes rank 1 overwrite a weight with NaN before step 7; "slow:seconds=0.3" makes
every step that much longer. Both are refused for real models: those of a recipe that scales no other, with ten million
parameters or more.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

from torch import nn

from recipes.errors import UserError
from recipes.recipe import Recipe

VARIABLE = "RECIPES_TEST_FAULT"
SMALL = 10_000_000


@dataclass(frozen=True)
class InjectedFault:
    """What the environment asks for; usually nothing."""

    nan_at: tuple[int, int] | None = None
    """Step and rank."""
    seconds: float = 0.0
    """Before each step."""

    def strike(self, model: nn.Module, step: int, rank: int) -> None:
        """Does what is due before this step."""
        if self.seconds:
            time.sleep(self.seconds)
        if self.nan_at == (step, rank):
            next(model.parameters()).data.fill_(float("nan"))


def injected_fault(recipe: Recipe) -> InjectedFault:
    """Reads the environment.

    Raises:
        UserError: it is malformed, or the recipe is a real one.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return InjectedFault()
    match = re.fullmatch(r"nan:step=(\d+):rank=(\d+)|slow:seconds=(\d+(?:\.\d+)?)", text)
    if match is None:
        raise UserError(f"{VARIABLE} is '{text}'", "unset it, or write nan:step=7:rank=1 or slow:seconds=0.3")
    if recipe.scale == 1 and recipe.model.parameters >= SMALL:
        raise UserError(f"{VARIABLE} is set, and {recipe.name} is no small-scale recipe", "unset it: it is for tests")
    step, rank, seconds = match.groups()
    return InjectedFault(seconds=float(seconds)) if seconds else InjectedFault(nan_at=(int(step), int(rank)))
