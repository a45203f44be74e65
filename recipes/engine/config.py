"""A stage's configuration for Nanotron 0.4, from the recipe and the plan: a pure function, as plain data for YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from recipes.engine.checkpoint import Topology
from recipes.errors import UserError
from recipes.files import write_atomic
from recipes.plan import StagePlan
from recipes.recipe import Recipe, Schedule


def accumulation(stage: StagePlan, dp: int) -> int:
    """Micro-batches a step on each of `dp` data-parallel ranks, so that the step's samples stay the plan's.

    Raises:
        UserError: they do not divide.
    """
    rounds, left = divmod(stage.samples_per_step, dp * stage.micro_batch)
    if left or not rounds:
        found = f"{stage.samples_per_step} samples a step do not divide among {dp} ranks × {stage.micro_batch} a time"
        raise UserError(found, "start another number of processes, or change the stage's micro_batch")
    return rounds


def nanotron_config(
    recipe: Recipe, stage: StagePlan, topology: Topology, checkpoints: Path, *, resume: Path | None = None,
    weights: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Nanotron's configuration of one stage.

    Args:
        topology: of this start; its dp may be another than the recipe's.
        checkpoints: the folder that gets the stage's checkpoints.
        resume: a checkpoint to go on from: weights, optimizer, schedule and step.
        weights: a checkpoint to take nothing but weights from. Without either, they are drawn at random.

    Raises:
        UserError: something that Nanotron 0.4 gets wrong or cannot do.
    """
    rounds = accumulation(stage, topology.dp)
    _refuse(recipe, topology.pp, rounds)
    model, parallel = recipe.model, recipe.parallelism
    return {
        "general": {"project": recipe.name, "run": stage.name, "seed": recipe.seed},
        "parallelism": {
            "dp": topology.dp, "tp": topology.tp, "pp": topology.pp, "pp_engine": parallel.pp_engine,
            "tp_mode": parallel.tp_mode, "tp_linear_async_communication": False,
        },
        "model": {
            "dtype": model.dtype,
            "init_method": {"std": model.init_std} if weights is None else {"path": str(weights)},
            "model_config": _model(recipe, stage),
        },
        "tokenizer": {"tokenizer_name_or_path": recipe.tokenizer.name},
        "checkpoints": {
            "checkpoints_path": str(checkpoints), "checkpoint_interval": recipe.checkpoints.interval,
            "checkpoints_path_is_shared_file_system": True,
            "resume_checkpoint_path": None if resume is None else str(resume),
        },
        "logging": {"log_level": "warning", "log_level_replica": "warning", "iteration_step_info_interval": 1},
        "tokens": {
            "sequence_length": stage.sequence_length, "train_steps": stage.end_step,
            "micro_batch_size": stage.micro_batch, "batch_accumulation_per_replica": rounds,
        },
        "optimizer": _optimizer(recipe, stage.schedule),
    }  # fmt: skip


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Writes a configuration as YAML, atomically; the same configuration gives the same bytes."""
    write_atomic(path, yaml.safe_dump(config, sort_keys=False))


def _refuse(recipe: Recipe, pp: int, rounds: int) -> None:
    file, parallel = recipe.files[0], recipe.parallelism
    if parallel.tp_linear_async_communication:
        found = "true makes Nanotron 0.4 compute wrong gradients in row-parallel layers"
        raise UserError(found, "write false", file, "parallelism.tp_linear_async_communication")
    if recipe.model.dtype == "float32" and recipe.optimizer.accumulate_grad_in_fp32:
        found = "Nanotron 0.4 accumulates in fp32 only for models of another dtype"
        raise UserError(found, "write false, or dtype bfloat16", file, "optimizer.accumulate_grad_in_fp32")
    if not recipe.model.rope_interleaved:
        found = "Nanotron 0.4 trains with interleaved rotary embeddings only"
        raise UserError(found, "write true", file, "model.rope_interleaved")
    if parallel.pp_engine == "1f1b" and rounds < pp - 1:
        found = f"1f1b over {pp} pipeline ranks needs {pp - 1} micro-batches a step, not {rounds}"
        raise UserError(found, "write afab, or a smaller micro_batch", file, "parallelism.pp_engine")


def _model(recipe: Recipe, stage: StagePlan) -> dict[str, Any]:
    model = recipe.model
    return {
        "hidden_size": model.hidden, "intermediate_size": model.ffn, "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings, "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std, "max_position_embeddings": stage.sequence_length,
        "rope_theta": float(stage.rope_theta),
        "is_rope_llama_config": True,  # a key that LlamaConfig lacks: dacite then leaves the mapping to engine/model.py
    }  # fmt: skip


def _optimizer(recipe: Recipe, schedule: Schedule) -> dict[str, Any]:
    optimizer = recipe.optimizer
    return {
        "adam_beta1": optimizer.beta1, "adam_beta2": optimizer.beta2, "adam_eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay, "clip_grad": optimizer.clip, "torch_adam_is_fused": True,
        "zero_stage": optimizer.zero_stage, "accumulate_grad_in_fp32": optimizer.accumulate_grad_in_fp32,
        "learning_rate_scheduler": {
            "learning_rate": schedule.peak_lr, "min_decay_lr": schedule.min_lr,
            "lr_warmup_style": "linear", "lr_warmup_steps": schedule.warmup_steps,
            "lr_decay_style": "linear", "lr_decay_starting_step": schedule.decay_start_step,
            "lr_decay_steps": schedule.decay_steps,
        },
    }  # fmt: skip
