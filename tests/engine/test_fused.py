"""Fused parts against Nanotron's own, with the real trainer in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils

from recipes.engine.checkpoint import Topology
from recipes.engine.config import nanotron_config
from recipes.engine.gpu_case import Case, batches, trainer_of
from recipes.plan import make_plan
from tests.engine.tiny_run import environment, make_run

pytestmark = pytest.mark.slow

VARIANTS: dict[str, dict[str, Any]] = {
    "norm": {"norm": True},
    "rotary": {"rotary": True},
    "swiglu": {"swiglu": True},
    "attention": {"attention": "cudnn"},
    "loss": {"loss_rows": 48},  # 128 tokens: two chunks and a part of one
    "all": {"norm": True, "rotary": True, "swiglu": True, "attention": "flash", "loss_rows": 48, "layer": True},
}


def config_of(folder: Path, topology: Topology, **model: Any) -> dict[str, Any]:
    """The tiny recipe's configuration, with a rate that moves the weights."""
    fp32 = model.get("dtype") == "float32"
    over = {"model": model, "optimizer": {"accumulate_grad_in_fp32": not fp32}, "parallelism": {"pp_engine": "afab"}}
    run = make_run(folder, over)
    stage = replace(make_plan(run.recipe).stages[0], samples_per_step=4)
    config = nanotron_config(run.recipe, stage, topology, folder)
    config["optimizer"]["learning_rate_scheduler"]["lr_warmup_steps"] = 2
    return config


def gradients(trainer: Any, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of the first batch, by name."""
    model, batch = trainer.unwrapped_model, next(batches(config))
    model(**batch)["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return found


def compare(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """RopeLlama's losses, and how far each variant's losses and gradients are from RopeLlama's."""
    found: dict[str, Any] = {}
    for name, fused in {"plain": {}, **VARIANTS}.items():
        trainer = trainer_of(Case(name, "repository", config, fused, steps=5, weights="cpu"), folder)
        slopes = gradients(trainer, config)
        trainer.train(batches(config))
        losses = [loss.item() for loss in trainer.losses]
        if name == "plain":
            plain, plain_slopes, names = losses, slopes, list(trainer.unwrapped_model.state_dict())
            found["plain"] = losses
        else:
            assert list(trainer.unwrapped_model.state_dict()) == names and list(slopes) == list(plain_slopes)
            apart = [
                ((slopes[k].float() - v.float()).norm() / v.float().norm()).item() for k, v in plain_slopes.items()
            ]
            compiled = torch._dynamo.utils.counters["frames"]["ok"]
            assert compiled == (name == "all"), "all layers share what is compiled once: else PyTorch gives up at eight"
            found[name] = [max(abs(a - b) for a, b in zip(losses, plain, strict=True)), max(apart)]
    return found


def swap(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Whether the checkpoint of one model, loaded into the other, gives the same weights; both ways."""
    from nanotron.serialize.weights import load_weights, save_weights

    kinds: dict[str, dict[str, Any]] = {"plain": {}, "fused": VARIANTS["all"]}
    same = {}
    for source, target in (("plain", "fused"), ("fused", "plain")):
        a = trainer_of(Case(source, "repository", config, kinds[source], weights="cpu"), folder)
        b = trainer_of(Case(target, "repository", config, kinds[target]), folder)
        before = [torch.equal(x, y) for x, y in zip(*(t.model.parameters() for t in (a, b)), strict=True)]
        save_weights(model=a.unwrapped_model, parallel_context=a.parallel_context, root_folder=folder / source)
        load_weights(model=b.unwrapped_model, parallel_context=b.parallel_context, root_folder=folder / source)
        after = [torch.equal(x, y) for x, y in zip(*(t.model.parameters() for t in (a, b)), strict=True)]
        same[source] = not all(before) and all(after)
    return same


def on_ranks(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Losses of RopeLlama and of all that is fused, on several ranks; `None` where the pipeline has none."""
    from nanotron.parallel.pipeline_parallel.tensor_pointer import TensorPointer

    losses: dict[str, Any] = {}
    for name, fused in {"plain": {}, "all": VARIANTS["all"]}.items():
        trainer = trainer_of(Case(f"{name} {os.environ['RANK']}", "repository", config, fused, weights="cpu"), folder)
        model, rank = trainer.unwrapped_model, torch.distributed.get_rank(trainer.parallel_context.pp_pg)
        homes = {"input": model.input_pp_rank, "label": model.output_pp_rank}
        seen: list[Any] = []
        trainer.train_step_logs = lambda outputs, loss_avg, seen=seen: seen.append(loss_avg)
        trainer.train(
            {k: v if rank == homes[k[:5]] else TensorPointer(homes[k[:5]]) for k, v in batch.items()}
            for batch in batches(config)
        )
        losses[name] = [None if loss is None else loss.item() for loss in seen]
    return losses


def main() -> None:
    """FOLDER WORK CONFIG OUT: what `compare`, `swap` or `on_ranks` finds, as JSON."""
    import recipes.engine.compat  # noqa: F401
    from recipes.train import become_single_process

    become_single_process()
    torch.set_num_threads(1)
    folder, work, config, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    found = {"compare": compare, "swap": swap, "on_ranks": on_ranks}[work](folder, json.loads(config.read_text()))
    out.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(found))


def found_by(work: str, folder: Path, config: dict[str, Any], ranks: int = 1) -> list[dict[str, Any]]:
    """What each rank finds."""
    (folder / "config.json").write_text(json.dumps(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    arguments = [str(folder), work, str(folder / "config.json"), str(folder / "out.json")]
    command = [sys.executable, *launcher, "-m", "tests.engine.test_fused", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(ranks)]


def test_in_fp32_every_part_has_the_losses_and_gradients_of_nanotrons(tmp_path: Path) -> None:
    (found,) = found_by("compare", tmp_path, config_of(tmp_path, Topology(1, 1, 1, 0), dtype="float32"))
    plain = found.pop("plain")
    assert plain[0] - plain[-1] > 0.5
    assert set(found) == set(VARIANTS)
    for name, (loss, slope) in found.items():
        assert loss < 1e-5 and slope < 1e-5, (name, loss, slope)


def test_in_bf16_they_differ_by_rounding(tmp_path: Path) -> None:
    config = config_of(tmp_path, Topology(1, 1, 1, 0), kv_heads=4, tied_embeddings=False)
    (found,) = found_by("compare", tmp_path, config)
    plain = found.pop("plain")
    assert plain[0] - plain[-1] > 0.5
    for name, (loss, slope) in found.items():
        assert loss < 2**-8 * plain[-1] and slope < 4 * 2**-8, (name, loss, slope)


def test_a_checkpoint_of_one_loads_in_the_other(tmp_path: Path) -> None:
    (found,) = found_by("swap", tmp_path, config_of(tmp_path, Topology(1, 1, 1, 0)))
    assert found == {"plain": True, "fused": True}


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_on_several_ranks_what_does_not_apply_is_nanotrons(tmp_path: Path, tp: int, pp: int) -> None:
    config = config_of(tmp_path, Topology(1, tp, pp, 0), dtype="float32")
    config["parallelism"]["tp_mode"] = "REDUCE_SCATTER"
    losses = [found for found in found_by("on_ranks", tmp_path, config, 2) if found["plain"][0] is not None]
    assert len(losses) == (2 if pp == 1 else 1)
    for found in losses:
        assert found["plain"][0] - found["plain"][-1] > 0.1
        assert max(abs(a - b) for a, b in zip(found["plain"], found["all"], strict=True)) < 1e-5


def test_what_there_is_no_such_thing_as_is_refused() -> None:
    code = """
from recipes.engine.fused import Fused
for wrong in (Fused(attention="best"), Fused(layer=True, norm=True)):
    try:
        wrong.validate()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout == (
        "no attention named 'best'; there are flash, cudnn\n"
        "a compiled layer needs norm, rotary, swiglu and attention: the others are no graph's\n"
    )


def test_batches_are_the_same_everywhere_and_labels_follow(tmp_path: Path) -> None:
    config = config_of(tmp_path, Topology(1, 1, 1, 0))
    first, again = (list(islice(batches(config), 2)) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again, strict=True) for k in a)
    assert torch.equal(first[0]["input_ids"][:, 1:], first[0]["label_ids"][:, :-1])


if __name__ == "__main__":
    main()
