"""Between two stages of a rehearsal: the static mixture that the staged ones are compared with."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from recipes.lint import checked_plan
from recipes.loader import load, load_mixture
from recipes.loop import SHARE_PARTS, rounded, static_mixture


def test_the_static_mixture_takes_what_the_stages_take_together(tree: Path) -> None:
    recipe = load("smollm2-1.7b", tree)
    plan = checked_plan(recipe)
    path = tree / "static.yaml"
    path.write_text(yaml.safe_dump({"domains": static_mixture(plan)}, sort_keys=False))
    shares = load_mixture(path, recipe.sources).shares  # valid: sums to 1, period short enough
    tokens: dict[str, int] = {}
    for use in (use for stage in plan.stages for use in stage.sources):
        tokens[use.name] = tokens.get(use.name, 0) + use.tokens
    for name, taken in tokens.items():
        assert abs(shares.get(name, 0) - Fraction(taken, plan.tokens)) <= Fraction(1, SHARE_PARTS)
    assert set(tokens) - set(shares) == {"auggsm8k"}  # 0.02 % of a tenth of the run


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 10**12), min_size=1), st.integers(1, 5000))
def test_rounding_keeps_the_sum_and_stays_near(weights: dict[str, int], parts: int) -> None:
    total = sum(weights.values())
    if total == 0:
        return
    found = rounded(weights, parts)
    assert sum(found.values()) == parts
    for name, weight in weights.items():
        assert abs(found.get(name, 0) - Fraction(weight * parts, total)) < 1
