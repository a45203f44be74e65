"""On paper: the all-reduce of the gradients against the backward pass that it can hide behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table

from recipes.bench.data import surroundings
from recipes.errors import UserError
from recipes.files import write_json
from recipes.loader import load
from recipes.plan import H100_FLOPS, flops_per_token
from recipes.recipe import Model, Recipe
from recipes.show import wide_console

BACKWARD_SHARE = 2 / 3
"""Of a step's arithmetic: two products for each one of the forward pass."""

BUCKET = 25 * 2**20 / 2
"""Values of a bucket: PyTorch's and Nanotron's default of 25 MiB, counted in bf16 weights."""


@dataclass(frozen=True)
class Network:
    """What a ring over GPUs of several nodes has."""

    gpus_per_node: int = 8
    link_bits: float = 400e9
    """Bits a second of the one network card that each GPU has, either way at once."""
    efficiency: float = 0.8
    """chosen: share of the cards' rate that long messages reach."""
    hop_seconds: float = 5e-6
    """chosen: latency of one of a ring's 2(n − 1) steps, mean of those inside a node and between nodes."""

    def ring_seconds(self, size: float, gpus: int) -> float:
        """An all-reduce of `size` bytes: a ring for each card of a node, each carrying its part of the bytes."""
        rate = self.gpus_per_node * self.link_bits / 8 * self.efficiency
        return 2 * (gpus - 1) / gpus * size / rate + 2 * (gpus - 1) * self.hop_seconds


@dataclass(frozen=True)
class Exchange:
    """One step's all-reduce, for one way to cut the step into micro-batches."""

    micro_batch: int
    accumulation: int
    value_bytes: int
    """4 for fp32, 2 for bf16."""
    bytes: int
    """Of the gradients."""
    buckets: int
    reduce_seconds: float
    hidden_behind_seconds: float
    """The backward pass of the last micro-batch; the others' gradients are only added up (ZeRO 0)."""
    exposed_seconds: float
    """For which the GPUs wait: what is left over, and at least the last bucket, which is ready at the very end."""
    compute_seconds: float

    @property
    def lost(self) -> float:
        """Share of the step spent waiting."""
        return self.exposed_seconds / (self.compute_seconds + self.exposed_seconds)


def buckets_of(model: Model, least: float) -> list[int]:
    """Gradients of each bucket in the order of the backward pass, as PyTorch fills them: closed at `least` or more.

    The tied embedding's are the last: they are whole only when the first layer's input is reached.
    """
    kv_width = model.hidden // model.heads * model.kv_heads
    qkv, output = model.hidden * (model.hidden + 2 * kv_width), model.hidden**2
    layer = [model.ffn * model.hidden, 2 * model.ffn * model.hidden, model.hidden, output, qkv, model.hidden]
    buckets, filling = [], 0
    for size in [model.hidden, *layer * model.layers, model.vocab_size * model.hidden]:
        filling += size
        if filling >= least:
            buckets.append(filling)
            filling = 0
    return [*buckets, filling] if filling else buckets


def exchange(
    recipe: Recipe, micro_batch: int, accumulation: int, value_bytes: int, gpus: int, mfu: float, bucket_values: float,
    network: Network = Network(),
) -> Exchange:  # fmt: skip
    """Works out one step.

    Args:
        value_bytes: of a gradient as it is reduced.
        mfu: share of 989 TFLOP/s that forward and backward pass reach by themselves.
        bucket_values: gradients that are reduced together, at least.
    """
    model, length = recipe.model, recipe.stages[0].sequence_length
    buckets = buckets_of(model, bucket_values)
    times = [network.ring_seconds(values * value_bytes, gpus) for values in buckets]
    total, last = sum(times), times[-1]
    seconds = flops_per_token(model, length) * micro_batch * length / (H100_FLOPS * mfu)
    behind = BACKWARD_SHARE * seconds
    return Exchange(
        micro_batch, accumulation, value_bytes, sum(buckets) * value_bytes, len(buckets), total, behind,
        max(last, total - behind), accumulation * seconds,
    )  # fmt: skip


def exchanges(
    recipe: Recipe, gpus: int, mfu: float = 0.5, bucket_values: Iterable[float] = (BUCKET, 16 * BUCKET)
) -> Iterator[Exchange]:
    """Every way to cut the recipe's step, in fp32 and bf16, with small buckets and large ones.

    Raises:
        UserError: the step does not divide among so many GPUs.
    """
    length = recipe.stages[0].sequence_length
    sequences, left = divmod(recipe.tokens_per_step, gpus * length)
    if left:
        found = (
            f"a step of {recipe.tokens_per_step:,} tokens is no whole number of sequences of {length:,} on {gpus} GPUs"
        )
        raise UserError(found, "give a number of GPUs that divides it")
    for values in bucket_values:
        for micro_batch in (m for m in range(sequences, 0, -1) if sequences % m == 0):
            for value_bytes in (4, 2):
                yield exchange(recipe, micro_batch, sequences // micro_batch, value_bytes, gpus, mfu, values)


def bench_allreduce(recipe: str, gpus: int, mfu: float, json_path: Path | None) -> dict[str, Any]:
    """Works out every way to cut a recipe's step, prints it as a Markdown table, and what it assumes.

    Returns:
        What is written as JSON.

    Raises:
        UserError: no such recipe, or its step does not divide among so many GPUs.
    """
    rows, network = list(exchanges(load(recipe), gpus, mfu)), Network()
    result = {
        "recipe": recipe, "gpus": gpus, "mfu": mfu, "backward_share": BACKWARD_SHARE, "network": asdict(network),
        "exchanges": [{**asdict(row), "lost": row.lost} for row in rows], **surroundings(),
    }  # fmt: skip
    console = wide_console()
    console.print(table(rows))
    console.print(
        "Batch × rounds: sequences of a micro-batch, micro-batches a step on a GPU. Behind: the backward pass that\n"
        "hides it. Lost: of the step.\n"
        f"{recipe} on {gpus} GPUs, on paper: a ring over {network.gpus_per_node} cards of "
        f"{network.link_bits / 1e9:.0f} Gb/s a node at {network.efficiency:.0%} of their rate,\n"
        f"{network.hop_seconds * 1e6:.0f} µs for each of its {2 * (gpus - 1)} steps; arithmetic at {mfu:.0%} MFU.",
        highlight=False,
    )
    if json_path is not None:
        write_json(json_path, result)
    return result


def table(rows: Iterable[Exchange]) -> Table:
    """As it stands in docs/benchmarks.md."""
    names = ("reduced in", "GB", "buckets", "reduce, ms", "behind, ms", "exposed, ms", "lost")
    made = Table("batch × rounds", *names, box=MARKDOWN)
    for row in rows:
        times = (row.reduce_seconds, row.hidden_behind_seconds, row.exposed_seconds)
        made.add_row(
            f"{row.micro_batch} × {row.accumulation}", "fp32" if row.value_bytes == 4 else "bf16",
            f"{row.bytes / 1e9:.2f}", str(row.buckets), *(f"{1000 * s:,.1f}" for s in times), f"{row.lost:.1%}",
        )  # fmt: skip
    return made
