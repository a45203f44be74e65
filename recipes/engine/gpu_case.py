"""The measurements of `smol bench gpu`, in a process of their own: python -m recipes.engine.gpu_case CASES OUT.

CASES is a JSON list of `Case`; what each gives becomes a line of OUT. A GPU that is full ends one case, not the bench.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.bench.data import memory
from recipes.files import append_line

WARMUP = 5
"""Steps that are not timed: the first compiles, the next ones fill the allocator's cache."""
PRODUCTS = {"cuda": ((8192, 8192, 8192), (8192, 2048, 16384), (8192, 8192, 2048)), "cpu": ((256, 256, 256),)}
"""Rows, inner and columns of the matrix products: a large square, and the 1.7B's two of SwiGLU at micro-batch 4."""
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Case:
    """One measurement."""

    name: str
    kind: str
    """Of `KINDS`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Nanotron's."""
    fused: dict[str, Any] = field(default_factory=dict)
    """Fields of engine/fused.py's Fused; none: RopeLlama."""
    steps: int = 0
    """After the warm-up."""
    read_loss: bool = True
    """As soon as a step is done, as training does; else one step late, so that the host runs ahead of the GPU."""
    weights: str = "device"
    """Where random weights are drawn: "cpu" for the same ones on every device, which takes long for large models."""
    flash_attn: bool = True
    """Whether to use flash-attn where it is installed; one answer for all cases of a process."""
    paths: dict[str, str] = field(default_factory=dict)
    """For "logits": run, checkpoint and its conversion."""


class Clock:
    """Seconds between marks, by the GPU's own clock where there is one, which makes nobody wait."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Notes that something is done."""
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each two marks."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not torch.cuda.is_available():
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def device() -> str:
    """What everything runs on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def batches(config: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Random micro-batches without end, the same on every device: small ids are frequent, so that the loss falls."""
    tokens, vocabulary = config["tokens"], config["model"]["model_config"]["vocab_size"]
    shape = (tokens["micro_batch_size"], tokens["sequence_length"] + 1)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(shape[0], shape[1] - 1, dtype=torch.bool, device=device())
    while True:
        ids = (torch.rand(shape, generator=generator) ** 4 * vocabulary).long()
        ids = ids.pin_memory().to("cuda", non_blocking=True) if device() == "cuda" else ids
        parts = {"input_ids": ids[:, :-1].contiguous(), "label_ids": ids[:, 1:].contiguous()}
        yield {**parts, "input_mask": mask, "label_mask": mask}


def figures(case: Case, clock: Clock, losses: list[Tensor]) -> dict[str, Any]:
    """Seconds a step, losses in nats, peak bytes."""
    seconds = clock.seconds()[WARMUP - 1 :]
    on_gpu = device() == "cuda"
    return {
        "step_seconds": median(seconds), "fastest": min(seconds), "slowest": max(seconds), "steps": len(seconds),
        "losses": [loss.item() for loss in losses],
        "memory": torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM"),
    }  # fmt: skip


def drawn_on_cpu(model: Any, config: Any) -> None:
    """Random weights that are the same on every device: RMSNorm's are ones, the others of the configured deviation."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * config.model.init_method.std
            parameter.copy_(torch.ones_like(drawn) if parameter.dim() == 1 else drawn)


def model_class(case: Case) -> tuple[type[Any] | None, type[Any]]:
    """The configuration's and the model's class; Nanotron finds its own, which has no RoPE theta, by a key."""
    from recipes.engine.fused import Fused, with_parts
    from recipes.engine.model import RopeLlama, RopeLlamaConfig

    # isort: split
    from nanotron.models.llama import LlamaForTraining

    if case.kind == "nanotron":
        for key in ("rope_theta", "is_rope_llama_config"):
            case.config["model"]["model_config"].pop(key, None)
        case.config["model"]["model_config"]["is_llama_config"] = True
        return None, type("Llama", (LlamaForTraining,), {})
    model: type[Any] = with_parts(Fused(**case.fused)) if case.fused else type("Rope", (RopeLlama,), {})
    return RopeLlamaConfig, model


def trainer_of(case: Case, folder: Path) -> Any:
    """Nanotron's trainer of a case, with its loop and nothing of the loop's files."""
    import recipes.engine.compat  # noqa: F401  before nanotron

    # isort: split
    from nanotron.trainer import DistributedTrainer

    from recipes.engine.config import write_config

    class Measured(DistributedTrainer):  # type: ignore[misc]
        """Notes when each step ends, and its loss."""

        clock: Clock
        losses: list[Tensor]

        def pre_training(self, *args: Any, **kwargs: Any) -> None:
            """Starts the clock, and no wandb."""
            self.clock, self.losses = Clock(), []

        def train_step_logs(self, outputs: Any, loss_avg: Tensor) -> None:
            """After every step."""
            self.losses.append(loss_avg.detach())
            known = self.losses[-2:]
            known[-1 if case.read_loss else 0].item()
            self.clock.mark()

        def save_checkpoint(self) -> None:
            """Writes none."""

    config_class, model = model_class(case)
    if case.weights == "cpu":
        model.init_model_randomly = drawn_on_cpu
    path = folder / f"{case.name.replace(' ', '-')}.yaml"
    case.config["tokens"]["train_steps"] = WARMUP + case.steps
    write_config(path, case.config)
    return Measured(str(path), model_config_class=config_class, model_class=model)


def train(case: Case, folder: Path) -> dict[str, Any]:
    """Steps of Nanotron's trainer."""
    trainer = trainer_of(case, folder)
    trainer.train(batches(case.config))
    return figures(case, trainer.clock, trainer.losses)


def train_transformers(case: Case, folder: Path) -> dict[str, Any]:
    """Steps of transformers' Llama of the same shape, compiled, with PyTorch's fused AdamW and clipping.

    Weights, gradients and moments are bf16: less to move than the fp32 accumulation and master weights of the rest.
    Layers are compiled one by one: inside of what is compiled whole, transformers gives up causal attention without a
    mask, which is the fast one, where torch is older than 2.14.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from recipes.engine.fused import compiled

    shape, optimizer = dict(case.config["model"]["model_config"]), case.config["optimizer"]
    theta = shape.pop("rope_theta")
    shape.pop("is_rope_llama_config")
    shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "use_cache": False}
    with torch.device(device()):
        model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    model.to(torch.bfloat16)
    adam = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(optimizer["adam_beta1"], optimizer["adam_beta2"]),
        eps=optimizer["adam_eps"], weight_decay=optimizer["weight_decay"], fused=True,
    )  # fmt: skip

    for layer in model.model.layers:
        layer.forward = compiled(layer.forward)

    @compiled
    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), labels.flatten())

    clock, losses = Clock(), []
    for _, batch in zip(range(WARMUP + case.steps), batches(case.config), strict=False):
        loss = loss_of(model.model(batch["input_ids"]).last_hidden_state, batch["label_ids"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer["clip_grad"])
        adam.step()
        adam.zero_grad()
        loss.item()
        clock.mark()
        losses.append(loss.detach())
    return figures(case, clock, losses)


def matrix_products(case: Case, folder: Path) -> dict[str, Any]:
    """FLOP/s of bf16 matrix products of random numbers: the median of each shape, and the best of them.

    On a GPU 300 of each go before: it raises its clock from idle only by and by.
    """
    rates: dict[str, float] = {}
    for rows, inner, columns in PRODUCTS[device()]:
        a, b = (torch.randn(shape, device=device()).bfloat16() for shape in ((rows, inner), (inner, columns)))
        clock, count = Clock(), max(case.steps, 20)
        for _ in range((300 if device() == "cuda" else WARMUP) + count):
            a @ b
            clock.mark()
        rates[f"{rows} × {inner} × {columns}"] = 2 * rows * inner * columns / median(clock.seconds()[-count:])
    found: dict[str, Any] = {
        "rates": rates,
        "flops_per_second": max(rates.values()),
        "device": "cpu",
        "flash_attn": None,
    }
    if device() == "cuda":
        found["device"], found["cuda"] = torch.cuda.get_device_name(), torch.version.cuda
        found["memory"] = torch.cuda.get_device_properties(0).total_memory
    if find_spec("flash_attn") is not None:
        found["flash_attn"] = version("flash-attn")
    return found


def attention_parts(case: Case, folder: Path) -> dict[str, Any]:
    """Relative error of what Nanotron uses here, flash-attn's or the stand-ins in bf16, against stand-ins in fp32."""
    import recipes.engine.compat as compat

    # isort: split
    import nanotron.models.llama as llama
    import nanotron.nn.layer_norm as norms

    torch.manual_seed(0)
    batch, length, heads, kv_heads, d = 2, 64, 4, 2, 32
    ends = torch.arange(batch + 1, dtype=torch.int32, device=device()) * length
    rows = [torch.randn(batch * length, n, d, device=device()).bfloat16() for n in (heads, kv_heads, kv_heads)]
    q, kv = rows[0].view(batch, length, heads, d), torch.stack(rows[1:], 1).view(batch, length, 2, kv_heads, d)
    x, weight = rows[0].flatten(1), torch.rand(heads * d, device=device()).bfloat16()
    turn, turn_full = (of(d, interleaved=True) for of in (llama.FlashRotaryEmbedding, compat.RotaryEmbedding))

    def attention(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, ends, ends, length, length, causal=True)

    full = [row.float() for row in rows]
    pairs = {
        "attention": (attention(llama.flash_attn_varlen_func, *rows), attention(compat.flash_attn_varlen_func, *full)),
        "rotary": (turn.to(device())(q.clone(), kv=kv.clone())[0], turn_full(q.float(), kv.float())[0]),
        "norm": (norms.layer_norm_fn(x, weight, None, is_rms_norm=True),
                 compat.layer_norm_fn(x.float(), weight.float(), None, is_rms_norm=True)),
    }  # fmt: skip
    errors = {name: ((a.float() - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}
    return {"errors": errors, "replaced": compat.replaced}


def logits(case: Case, folder: Path) -> dict[str, Any]:
    """Relative difference of Nanotron's logits of a checkpoint and transformers' of its conversion, both in bf16."""
    from transformers import LlamaForCausalLM

    from recipes.engine.checkpoint import Topology
    from recipes.engine.config import nanotron_config, write_config
    from recipes.engine.trainer import StageTrainer
    from recipes.run import Run

    run, checkpoint = Run.load(Path(case.paths["run"])), Path(case.paths["checkpoint"])
    stage = run.plan.stages[0]
    write_config(
        folder / "logits.yaml", nanotron_config(run.recipe, stage, Topology(1, 1, 1, 0), folder, weights=checkpoint)
    )
    trainer = StageTrainer(run, stage, folder / "logits.yaml", lambda: False)
    ids = torch.randint(0, run.recipe.model.vocab_size, (2, stage.sequence_length)).to(device())
    theirs = LlamaForCausalLM.from_pretrained(case.paths["conversion"], dtype=torch.bfloat16).to(device())
    with torch.no_grad():
        ours = trainer.unwrapped_model.model(ids, torch.ones_like(ids, dtype=torch.bool)).transpose(0, 1).float()
        difference = ours - theirs(ids).logits.float()
    return {"error": (difference.norm() / ours.norm()).item(), "largest": difference.abs().max().item()}


KINDS: dict[str, Callable[[Case, Path], dict[str, Any]]] = {
    "nanotron": train, "repository": train, "transformers": train_transformers, "products": matrix_products,
    "parts": attention_parts, "logits": logits,
}  # fmt: skip


def main() -> None:
    """Reads the command line; writes a line for each case."""
    cases, out = [Case(**case) for case in json.loads(Path(sys.argv[1]).read_text())], Path(sys.argv[2])
    if not all(case.flash_attn for case in cases):
        sys.modules["flash_attn"] = None  # type: ignore[assignment]
    import recipes.engine.compat as compat  # before torch.compile and transformers are used
    from recipes.train import become_single_process, set_threads

    become_single_process()
    set_threads()
    for case in cases:
        try:
            result = KINDS[case.kind](case, out.parent)
        except torch.OutOfMemoryError:
            result = {"failed": OUT_OF_MEMORY}
        append_line(out, {**asdict(case), **result, "replaced": compat.replaced})
        torch._dynamo.reset()  # it holds on to the model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
