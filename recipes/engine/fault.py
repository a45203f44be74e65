"""For tests only: makes a rank write NaN. Everything else that can go wrong is done to a run from outside.

RECIPES_TEST_FAULT="nan:step=7:rank=1" makes rank 1 overwrite a weight with NaN before step 7. It is refused for real
models: those of a recipe that scales no other, with ten million parameters or more.
"""

from __future__ import annotations

import os
import re

from recipes.errors import UserError
from recipes.recipe import Recipe

VARIABLE = "RECIPES_TEST_FAULT"
SMALL = 10_000_000


def injected_fault(recipe: Recipe) -> tuple[int, int] | None:
    """The step and the rank that the environment asks for; usually None.

    Raises:
        UserError: it is malformed, or the recipe is a real one.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    match = re.fullmatch(r"nan:step=(\d+):rank=(\d+)", text)
    if match is None:
        raise UserError(f"{VARIABLE} is '{text}'", "unset it, or write nan:step=7:rank=1")
    if recipe.scale == 1 and recipe.model.parameters >= SMALL:
        raise UserError(f"{VARIABLE} is set, and {recipe.name} is no small-scale recipe", "unset it: it is for tests")
    return int(match[1]), int(match[2])
