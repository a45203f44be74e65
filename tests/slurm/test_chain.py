from __future__ import annotations

import math
from pathlib import Path

import pytest
from rich.console import Console

from recipes.errors import UserError
from recipes.lint import checked_plan
from recipes.loader import load
from recipes.slurm.chain import MARGIN, choose_stages, cost_table, draw_tree, make_chain, train_jobs
from recipes.slurm.profile import load_cluster

ROOT = Path(__file__).resolve().parents[2]
PLAN = checked_plan(load("smollm2-1.7b", ROOT))
CLUSTER = load_cluster("h100-32x8")
ALL = choose_stages(PLAN, None)


def test_the_chain_of_the_17b() -> None:
    chain = make_chain("x", PLAN, ALL, CLUSTER, 13)
    kinds = [(link.stage, link.kind) for link in chain]
    assert kinds == [
        ("stage1", "train"), ("stage1", "eval"), ("stage1", "propose"),
        ("stage2", "train"), ("stage2", "eval"), ("stage2", "propose"),
        ("stage3", "train"), ("stage3", "eval"), ("stage3", "propose"),
        ("stage4", "train"), ("stage4", "eval"),
    ]  # fmt: skip
    assert [link.gate for link in chain if link.kind == "train"] == [False, True, True, True]
    assert [link.after for link in chain[:4]] == [None, ("train", "stage1"), ("eval", "stage1"), ("propose", "stage1")]
    train, tests = chain[0], chain[1]
    assert (train.nodes, train.gpus, train.tasks, tests.tasks, tests.jobs) == (32, 256, 1, 13, 1)
    assert len({link.name for link in chain}) == len(chain)


def test_an_approved_stage_has_no_gate() -> None:
    chain = make_chain("x", PLAN, ALL, CLUSTER, 13, ["stage2"])
    assert [link.gate for link in chain if link.kind == "train"] == [False, False, True, True]


@pytest.mark.parametrize("stage", PLAN.stages, ids=lambda stage: stage.name)
@pytest.mark.parametrize("limit", [60, 240, 1440, 7 * 1440])
def test_the_jobs_last_for_the_planned_time_and_a_quarter_more(stage, limit: int) -> None:  # type: ignore[no-untyped-def]
    cluster = CLUSTER.model_copy(update={"time_limit": limit})
    jobs, minutes = train_jobs(stage, 256, cluster), stage.gpu_hours / 256 * 60
    useful = limit - cluster.signal_seconds / 60 - 10
    assert jobs * useful >= MARGIN * minutes > (jobs - 1) * useful
    assert jobs >= math.ceil(minutes / limit)


def test_a_limit_that_leaves_no_time_is_refused() -> None:
    with pytest.raises(UserError, match="leaves no time to train"):
        train_jobs(PLAN.stages[0], 256, CLUSTER.model_copy(update={"time_limit": 10}))


@pytest.mark.parametrize(
    ("text", "names"),
    [(None, "1234"), ("stage2", "2"), ("stage2..stage3", "23"), ("stage3..", "34"), ("..stage2", "12")],
)
def test_stages(text: str | None, names: str) -> None:
    assert [s.name for s in choose_stages(PLAN, text)] == [f"stage{n}" for n in names]


def test_a_branch_is_chosen_by_its_name_and_follows_its_trunk() -> None:
    (stage,) = choose_stages(PLAN, "long-context")
    chain = make_chain("x", PLAN, [stage], CLUSTER, 3)
    assert [link.kind for link in chain] == ["train", "eval"]
    assert chain[0].after == ("train", "stage4") and chain[0].gate


@pytest.mark.parametrize("text", ["stage5", "stage1..stage9", "stage1..long-context", "stage3..stage2", "x..y"])
def test_stages_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--stages"):
        choose_stages(PLAN, text)


def test_the_tree_and_the_cost_say_what_the_plan_says() -> None:
    chain = make_chain("x", PLAN, ALL, CLUSTER, 13)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(draw_tree("x", "x: smollm2-1.7b", chain, PLAN, CLUSTER, {"x-stage1-train": "job 17"}))
    console.print(cost_table(chain, PLAN))
    text = console.export_text()
    assert "10 jobs of 24 h in turn, 32 × 8 GPUs, 7.9 days planned  job 17" in text
    assert "13 × 1 GPU, at most 4 h each, after stage1's train" in text
    assert text.count("held until smol approve x stage") == 3
    assert f"{PLAN.gpu_hours:,.0f}" in text
    tests = 4 * 13 * 4
    assert f"${(PLAN.gpu_hours + tests) * 2.8:,.0f}" in text
