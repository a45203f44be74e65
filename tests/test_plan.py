"""The published figures (facts: 1, 2, 3) come out of the recipe files."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.interleave import Interleave
from recipes.lint import checked_plan
from recipes.loader import load
from recipes.plan import Plan, flops_per_token, learning_rate, make_plan
from recipes.recipe import Mixture, Recipe, Schedule

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def big() -> Plan:
    return checked_plan(load("smollm2-1.7b", ROOT))


def test_published_figures_of_the_1_7b(big: Plan) -> None:
    assert big.parameters == 1_711_376_384
    assert big.tokens_per_step == 2_097_152
    assert big.steps == 5_240_000
    assert [s.end_step for s in big.stages] == [2_861_022, 3_814_697, 4_768_371, 5_240_000]
    assert big.decay_start_step == 4_716_000
    assert big.days == pytest.approx(14.4, abs=0.05) and big.gpus == 256
    assert big.flops == pytest.approx(1.26e23, rel=0.01)
    assert big.cost == pytest.approx(250_000, rel=0.02)
    assert flops_per_token(load("smollm2-1.7b", ROOT).model, 2048) == pytest.approx(11.5e9, rel=0.005)


def test_published_tokens_and_epochs_by_source(big: Plan) -> None:
    used: dict[str, int] = {}
    for stage in big.stages:
        for use in stage.sources:
            used[use.name] = used.get(use.name, 0) + use.tokens
    for name, tokens in {
        "fineweb-edu": 4.96e12,
        "dclm": 4.0e12,
        "starcoderdata": 1.0e12,
        "cosmopedia-v2": 40e9,
    }.items():
        assert used[name] == pytest.approx(tokens, rel=0.015), name
    last = {use.name: use.epochs_run for stage in big.stages for use in stage.sources}
    assert last["fineweb-edu"] == pytest.approx(3.8, abs=0.05)
    assert last["dclm"] == pytest.approx(1.05, abs=0.01)
    assert last["starcoderdata"] == pytest.approx(4.0, abs=0.01)
    in_stage2 = {use.name: use for use in big.stage("stage2").sources}
    assert in_stage2["open-web-math"].epochs == pytest.approx(8.3, abs=0.05)
    domains = {s.name: {} for s in big.stages}
    for stage in big.stages:
        for use in stage.sources:
            domains[stage.name][use.domain] = domains[stage.name].get(use.domain, 0) + use.share
    published = {"stage1": (90, 10), "stage2": (75, 20, 5), "stage3": (74, 16, 10), "stage4": (58, 24, 14, 4)}
    assert {n: tuple(int(s * 100) for s in d.values()) for n, d in domains.items()} == published


SMALL = [("smollm2-360m", 4.09e12, 2_600_000), ("smollm2-135m", 2.10e12, 2_000_000)]


@pytest.mark.parametrize(("name", "tokens", "steps"), SMALL)
def test_small_models(name: str, tokens: float, steps: int) -> None:
    plan = checked_plan(load(name, ROOT))
    assert (plan.steps, plan.tokens) == (steps, pytest.approx(tokens, rel=0.003))
    assert plan.decay_start_step == steps * 8 // 10
    assert all(use.epochs_run is None or use.epochs_run <= 4.5 for use in plan.stages[0].sources)


def test_learning_rate_lags_one_step_and_reaches_zero_after_the_end(big: Plan) -> None:
    schedule = big.stages[0].schedule
    assert learning_rate(schedule, 1) == 0
    assert learning_rate(schedule, 1001) == pytest.approx(2.5e-4)
    assert learning_rate(schedule, 2001) == learning_rate(schedule, 4_716_001) == 5e-4
    assert learning_rate(schedule, 4_978_001) == pytest.approx(2.5e-4)
    assert learning_rate(schedule, 5_240_000) > 0 == learning_rate(schedule, 5_240_001)


def test_long_context_branches_75b_before_the_end(big: Plan) -> None:
    branch, trunk = big.branches[0], big.stage("stage4")
    assert branch.start_step == 5_240_000 - 75 * 10**9 // 2_097_152
    assert trunk.kept_steps == (branch.start_step, 5_240_000)
    assert branch.rope_theta == 130_000 and branch.sequence_length == 8192
    assert branch.tokens == pytest.approx(75e9, rel=1e-4)
    counts = Interleave(trunk.shares).counts((branch.start_step - trunk.start_step) * trunk.samples_per_step)
    dclm = trunk.offsets["dclm"] + int(counts[1]) * 2048
    assert 0 <= branch.offsets["dclm"] - dclm < 8192


def test_families_count_overlaps(big: Plan) -> None:
    infimm = next(f for f in big.families if f.name == "infimm-webmath")
    assert infimm.sources == ("infimm-webmath", "infiwebmath-3plus")
    assert infimm.unique_tokens == 40 * 10**9
    assert infimm.epochs == infimm.epochs_run == pytest.approx((160e9 + 0.095 * 989.1e9) / 40e9, rel=1e-3)
    in_stage4 = next(f for f in big.stage("stage4").families if f.name == "infimm-webmath")
    assert in_stage4.epochs == pytest.approx(0.095 * 989.1e9 / 40e9, rel=1e-3)
    assert in_stage4.epochs_run == infimm.epochs and in_stage4.sources == ("infiwebmath-3plus",)


def test_a_branch_of_an_earlier_stage_knows_nothing_of_the_later_ones(tree: Path) -> None:
    path = tree / "stages" / "smollm2-1.7b" / "long-context.yaml"
    path.write_text(path.read_text().replace("stage: stage4", "stage: stage2"))
    plan = make_plan(load("smollm2-1.7b", tree))
    branch, trunk = plan.branches[0], plan.stage("stage2")
    assert trunk.start_step < branch.start_step < trunk.end_step
    assert branch.offsets["stack-edu"] == 0
    assert trunk.offsets["dclm"] < branch.offsets["dclm"] < plan.stage("stage3").offsets["dclm"]


SHARES = st.lists(st.integers(1, 400), min_size=1, max_size=4).map(lambda w: [Fraction(x, sum(w)) for x in w])
STAGES = st.lists(st.tuples(SHARES, st.sampled_from([32, 64, 128]), st.integers(1, 300)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(STAGES)
def test_stages_carry_on_where_the_last_one_stopped(stages: list[tuple[list[Fraction], int, int]]) -> None:
    """Exactly there with the same sequence length; with another at the next block at the latest; never back."""
    recipe = _recipe(stages)
    plan, position = make_plan(recipe), dict.fromkeys("abcd", 0)
    lengths: dict[str, int] = {}
    for stage in plan.stages:
        for use in stage.sources:
            skipped = use.offset - position[use.name]
            assert use.offset % stage.sequence_length == 0
            assert 0 <= skipped < recipe.block_tokens
            assert use.offset <= -(-position[use.name] // recipe.block_tokens) * recipe.block_tokens
            if lengths.get(use.name, stage.sequence_length) == stage.sequence_length:
                assert skipped == 0
            position[use.name] = use.offset + use.tokens
            lengths[use.name] = stage.sequence_length
        assert sum(use.samples for use in stage.sources) == stage.samples


def _recipe(stages: list[tuple[list[Fraction], int, int]]) -> Recipe:
    """The 1.7B's recipe with other stages: (shares of a, b, c …; sequence length; steps)."""
    from dataclasses import replace

    base = load("smollm2-1.7b", ROOT)
    made, start = [], 0
    for i, (shares, length, steps) in enumerate(stages):
        sources = dict(zip("abcd", shares, strict=False))
        mixture = Mixture.model_validate({"domains": {"web": {"share": 1, "sources": sources}}})
        made.append(replace(base.stages[0], name=f"s{i}", start_step=start, end_step=start + steps,
                            sequence_length=length, mixture=mixture))  # fmt: skip
        start += steps
    source = base.sources["dclm"]
    return replace(base, stages=tuple(made), branches=(), tokens_per_step=128, block_tokens=256,
                   sources=dict.fromkeys("abcd", source.model_copy(update={"family": None})))  # fmt: skip


WITHOUT = """
import sys
from recipes.cli import main
sys.argv = ["smol", "plan", "--json"]
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "nanotron", "datatrove", "transformers", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_plan_answers_without_torch_or_nanotron() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == 1_711_376_384


def test_json_keys_are_documented(big: Plan) -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    data = big.as_dict()
    rows = [
        data,
        data["stages"][0],
        data["stages"][0]["sources"][0],
        data["families"][0],
        data["stages"][0]["schedule"],
    ]
    for key in {key for row in rows for key in row}:
        assert f"`{key}`" in text, key


@given(st.integers(0, 3000), st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 9000))
def test_learning_rate_is_continuous(warmup: int, constant: int, decay: int, step: int) -> None:
    schedule = Schedule(
        peak_lr=1.0, min_lr=0.0, warmup_steps=warmup, decay_start_step=warmup + constant, decay_steps=decay
    )
    largest = max(1 / decay, 1 / warmup if warmup else 1.0)
    assert abs(learning_rate(schedule, step + 1) - learning_rate(schedule, step)) <= largest + 1e-12
