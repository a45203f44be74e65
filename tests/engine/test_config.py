"""Nanotron's configuration of a stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.engine.checkpoint import Topology
from recipes.engine.config import accumulation, nanotron_config, write_config
from recipes.errors import UserError
from recipes.loader import load
from recipes.plan import make_plan
from recipes.recipe import Recipe
from tests.engine.tiny_run import ROOT, make_run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The tiny recipe."""
    return make_run(tmp_path_factory.mktemp("config")).recipe


def config(recipe: Recipe, stage: str = "stage2", **options: Any) -> dict[str, Any]:
    """The configuration for the recipe's own topology."""
    parallel, zero = recipe.parallelism, recipe.optimizer.zero_stage
    topology = Topology(parallel.dp, parallel.tp, parallel.pp, zero)
    return nanotron_config(recipe, make_plan(recipe).stage(stage), topology, Path("checkpoints"), **options)


def changed(recipe: Recipe, part: str, **values: Any) -> Recipe:
    """The recipe with another value in one part, past lint."""
    return dataclasses.replace(recipe, **{part: getattr(recipe, part).model_copy(update=values)})


def test_a_stage_is_trained_to_its_end_by_the_plans_schedule(recipe: Recipe) -> None:
    made = config(recipe)
    assert made["tokens"] == {
        "sequence_length": 64, "train_steps": 23, "micro_batch_size": 2, "batch_accumulation_per_replica": 1,
    }  # fmt: skip
    assert made["optimizer"]["learning_rate_scheduler"] == {
        "learning_rate": 3e-3, "min_decay_lr": 0.0, "lr_warmup_style": "linear", "lr_warmup_steps": 4,
        "lr_decay_style": "linear", "lr_decay_starting_step": 16, "lr_decay_steps": 8,
    }  # fmt: skip
    assert made["model"]["model_config"]["rope_theta"] == 50000.0
    assert config(recipe, "stage1")["model"]["model_config"]["rope_theta"] == 10000.0
    assert made["model"]["init_method"] == {"std": 0.05}


def test_the_real_recipe_gives_the_published_configuration() -> None:
    made = config(load("smollm2-1.7b", ROOT), "stage1")
    assert made["tokens"] | made["parallelism"] | made["optimizer"]["learning_rate_scheduler"] == {
        "sequence_length": 2048, "train_steps": 2_861_022, "micro_batch_size": 4, "batch_accumulation_per_replica": 1,
        "dp": 256, "tp": 1, "pp": 1, "pp_engine": "1f1b", "tp_mode": "REDUCE_SCATTER",
        "tp_linear_async_communication": False, "learning_rate": 5e-4, "min_decay_lr": 0.0, "lr_warmup_style": "linear",
        "lr_warmup_steps": 2000, "lr_decay_style": "linear", "lr_decay_starting_step": 4_716_000,
        "lr_decay_steps": 524_000,
    }  # fmt: skip


def test_weights_and_optimizer_come_from_where_they_are_said_to(recipe: Recipe) -> None:
    assert config(recipe, weights=Path("init/0"))["model"]["init_method"] == {"path": "init/0"}
    assert config(recipe, resume=Path("a/12"))["checkpoints"]["resume_checkpoint_path"] == "a/12"


def test_any_number_of_ranks_that_divides_gets_the_same_step(recipe: Recipe) -> None:
    stage = make_plan(recipe).stages[0]
    assert [accumulation(stage, dp) for dp in (1, 2)] == [2, 1]
    for dp in (3, 4):
        with pytest.raises(UserError, match="8 samples a step do not divide"):
            accumulation(stage, dp)


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("parallelism", {"tp_linear_async_communication": True}, "wrong gradients"),
        ("model", {"dtype": "float32"}, "accumulates in fp32 only"),
        ("model", {"rope_interleaved": False}, "interleaved rotary"),
        ("parallelism", {"pp": 4, "dp": 1}, "1f1b over 4 pipeline ranks needs 3 micro-batches a step, not 2"),
    ],
)
def test_what_nanotron_gets_wrong_is_refused(recipe: Recipe, part: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        config(changed(recipe, part, **values))
    assert str(recipe.files[0]) in str(error.value)


def test_the_same_configuration_gives_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_config(tmp_path / name, config(recipe))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert yaml.safe_load((tmp_path / "a").read_text()) == config(recipe)
