"""RopeLlama with fewer and larger kernels: the same parameters, names, checkpoints and, up to rounding, losses.

What can be replaced, each on its own (`Fused`): RMSNorm, the rotary embedding, SwiGLU, attention, the loss, and the
decoder layer as a whole. Elementwise work is written in plain PyTorch; on a GPU Inductor makes one kernel of it forward
and one backward, on a CPU it runs as it is. Training only: generation's key-value cache is Nanotron's own model's.

With tensor parallelism the linear layers stay Nanotron's, and so does the layer's boundary; the loss is then Nanotron's
too (logits are sharded), as it is with a pipeline, and the layer is not compiled (its collectives are no graph's).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import recipes.engine.compat  # noqa: F401  before nanotron

# isort: split
import nanotron.models.llama as llama
from nanotron.nn.layer_norm import TritonRMSNorm

from recipes.engine.model import RopeLlama, RopeLlamaConfig

ROWS = 2048
"""Tokens whose fp32 logits are held at once: 0.4 GB with 49,152 tokens of vocabulary, and whole tiles of a product."""
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
"""Of scaled_dot_product_attention on a GPU, by the name in `Fused.attention`."""


@dataclass(frozen=True)
class Fused:
    """What is replaced."""

    norm: bool = False
    """RMSNorm by PyTorch's own."""
    rotary: bool = False
    """The rotary embedding of queries and keys in one kernel, with nothing copied before it."""
    swiglu: bool = False
    """SwiGLU in one kernel, which keeps nothing but its input for the backward pass."""
    attention: str = ""
    """"flash" or "cudnn": scaled_dot_product_attention by this backend alone, and activations kept (batch, sequence, ·)
    from layer to layer, so that nothing is transposed. Empty: Nanotron's."""
    loss_rows: int = 0
    """Tokens of a chunk of the cross-entropy, which never holds all logits; 0: Nanotron's, which does, in fp32."""
    layer: bool = False
    """The decoder layer compiled as one, with all that is fused inside it."""

    def validate(self) -> None:
        """Raises ValueError for what there is no such thing as."""
        if self.attention not in ("", *BACKENDS):
            raise ValueError(f"no attention named {self.attention!r}; there are {', '.join(BACKENDS)}")
        if self.layer and not (self.norm and self.rotary and self.swiglu and self.attention):
            raise ValueError("a compiled layer needs norm, rotary, swiglu and attention: the others are no graph's")


ALL = Fused(norm=True, rotary=True, swiglu=True, attention="flash", loss_rows=ROWS, layer=True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for fixed shapes; without a GPU it is only traced, as no compiler may be at hand."""
    return torch.compile(function, dynamic=False, backend="inductor" if torch.cuda.is_available() else "aot_eager")


def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one kernel on a GPU; as it is on a CPU, and inside of what is compiled anyway."""
    fast = compiled(function)

    @functools.wraps(function)
    def call(x: Tensor, *args: Any) -> Any:
        return (fast if x.is_cuda and not torch.compiler.is_compiling() else function)(x, *args)

    return call


@one_kernel
def swiglu(merged: Tensor) -> Tensor:
    """silu(gate) · up of [gate|up] (…, 2 · ffn): (…, ffn)."""
    gate, up = merged.chunk(2, -1)
    return F.silu(gate) * up


@one_kernel
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbours (0, 1), (2, 3) … of x (batch, sequence, heads, d) by their angles; arithmetic in fp32."""
    a, b = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos.float(), sin.float()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


@functools.lru_cache(maxsize=4)
def rotary_table(length: int, d: int, theta: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, 1, d / 2), one table for all layers; in `dtype`, as flash-attn's are."""
    exponents = torch.arange(0, d, 2, dtype=torch.float32, device=device) / d
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), theta**-exponents)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


@one_kernel
def row_losses(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of logits (rows, vocabulary), summed, in nats; and its slope, in the logits' dtype."""
    full = logits.float()
    log_sum = full.logsumexp(-1, keepdim=True)
    losses = (log_sum - full.gather(-1, labels[:, None]))[:, 0]
    hit = torch.arange(full.shape[-1], device=full.device) == labels[:, None]
    slope = ((full - log_sum).exp() - hit.float()) * weights[:, None]
    return (losses * weights).sum(), slope.to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear head, some tokens at a time; gradients are made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, mask: Tensor, rows: int, slopes: bool
    ) -> Tensor:
        """The loss in nats, fp32; `slopes`: whether gradients will be asked for.

        Args:
            hidden: (tokens, width).
            head: (vocabulary, width), without a bias.
            labels, mask: (tokens).
            rows: tokens of a chunk.
        """
        weights = mask / mask.sum()
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if slopes else None
        to_head = torch.zeros_like(head, dtype=torch.float32) if slopes else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            part_loss, slope = row_losses(hidden[part] @ head.T, labels[part], weights[part])
            loss += part_loss
            if to_hidden is not None and to_head is not None:
                torch.mm(slope, head, out=to_hidden[part])
                to_head += slope.T @ hidden[part]
        if to_hidden is not None and to_head is not None:
            ctx.save_for_backward(to_hidden, to_head.to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients."""
        to_hidden, to_head = ctx.saved_tensors
        return to_hidden * slopes[0], to_head * slopes[0], None, None, None, None


def chunked_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, mask: Tensor, rows: int = ROWS) -> Tensor:
    """Mean loss in nats over the tokens in `mask`; see ChunkedCrossEntropy."""
    slopes = torch.is_grad_enabled()
    loss: Tensor = ChunkedCrossEntropy.apply(hidden, head, labels, mask, rows, slopes)  # type: ignore[no-untyped-call]
    return loss


class FusedNorm(TritonRMSNorm):  # type: ignore[misc]
    """RMSNorm by PyTorch's own."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises the last dimension; statistics in fp32."""
        return F.rms_norm(input, input.shape[-1:], self.weight, self.eps)


class FusedLayer(llama.LlamaDecoderLayer):  # type: ignore[misc]
    """A decoder layer whose parts are replaced one by one; its modules and parameters are Nanotron's."""

    def __init__(self, fused: Fused, config: RopeLlamaConfig, tp_pg: Any, **kwargs: Any) -> None:
        """`config`, `tp_pg` and `kwargs` are LlamaDecoderLayer's."""
        super().__init__(config=config, tp_pg=tp_pg, **kwargs)
        self.fused, self.theta, self.alone = fused, config.rope_theta, tp_pg.size() == 1
        self.batch_first = bool(fused.attention) and self.alone
        if fused.norm:
            self.input_layernorm = FusedNorm(config.hidden_size, config.rms_norm_eps)
            self.post_attention_layernorm = FusedNorm(config.hidden_size, config.rms_norm_eps)
        self.whole = compiled(self.layer) if fused.layer and self.alone else self.layer

    def forward(self, hidden_states: Tensor, sequence_mask: Tensor) -> dict[str, Tensor]:
        """As LlamaDecoderLayer: hidden_states (sequence, batch, hidden), in whatever order they lie in memory."""
        table = None
        if self.fused.rotary:
            x, length = hidden_states, sequence_mask.shape[1]
            table = rotary_table(length, self.attn.d_qk, self.theta, x.dtype, x.device)
        x = hidden_states.transpose(0, 1).contiguous() if self.batch_first else hidden_states
        x = self.whole(x, sequence_mask, table)
        return {"hidden_states": x.transpose(0, 1) if self.batch_first else x, "sequence_mask": sequence_mask}

    def layer(self, x: Tensor, mask: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """x (batch, sequence, hidden) if `batch_first`, else (sequence, batch, hidden)."""
        x = x + self.attend(self.input_layernorm(x), mask, table)
        merged = self.linear(self.mlp.gate_up_proj, self.post_attention_layernorm(x))
        gated = swiglu(merged) if self.fused.swiglu else self.mlp.split_silu_mul(merged)
        return x + self.linear(self.mlp.down_proj, gated)

    def attend(self, x: Tensor, mask: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """Causal self-attention over full sequences."""
        attn = self.attn
        if table is None and not self.fused.attention:
            out: Tensor = attn(hidden_states=x, sequence_mask=mask)["hidden_states"]
            return out
        qkv = self.linear(attn.qkv_proj, x)
        qkv = qkv if self.batch_first else qkv.transpose(0, 1)
        qkv = qkv.view(*qkv.shape[:2], -1, attn.d_qk)
        q, k, v = self.rotated(qkv, table)
        if self.fused.attention:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=attn.is_gqa).transpose(1, 2)
        else:
            parts = {"query_states": q, "key_states": k, "value_states": v}
            rows = {name: part.flatten(0, 1).contiguous() for name, part in parts.items()}
            out = attn.attention(**rows, q_sequence_mask=mask, kv_sequence_mask=mask).view_as(q)
        out = out.flatten(2)
        return self.linear(attn.o_proj, out if self.batch_first else out.transpose(0, 1))

    def rotated(self, qkv: Tensor, table: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """Queries, keys and values (batch, sequence, heads, d) of all heads in a row."""
        attn = self.attn
        heads, kv_heads = attn.n_local_q_heads, attn.n_local_kv_heads
        if table is not None:
            qk = rotate(qkv[:, :, : heads + kv_heads], *table)
            return qk[:, :, :heads], qk[:, :, heads:], qkv[:, :, heads + kv_heads :]
        q, k, v = torch.split_with_sizes(qkv, (heads, kv_heads, kv_heads), 2)
        q, kv = attn.flash_rotary_embedding(q.contiguous(), kv=torch.stack((k, v), 2))
        return q, *kv.unbind(2)

    def linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        """A linear layer without a bias; Nanotron's own where it communicates."""
        out: Tensor = F.linear(x, module.weight) if self.alone else module(x)
        return out


class FusedLlama(RopeLlama):
    """RopeLlama with fused parts, for Nanotron's `model_class`; `with_parts` makes one with others."""

    fused = ALL

    def __init__(self, config: RopeLlamaConfig, **kwargs: Any) -> None:
        """`kwargs` are LlamaForTraining's."""
        super().__init__(config=config, **kwargs)
        self.fused.validate()
        if self.fused.swiglu and config.hidden_act != "silu":
            raise ValueError(f"swiglu is silu's; the configuration says {config.hidden_act}")
        for block in self.model.decoder:
            block.module_builder, block.module_kwargs = FusedLayer, {"fused": self.fused, **block.module_kwargs}
        if self.fused.norm:
            self.model.final_layer_norm.module_builder = FusedNorm
        context = self.parallel_context
        self.chunked = self.fused.loss_rows > 0 and context.tp_pg.size() == context.pp_pg.size() == 1

    def forward(
        self, input_ids: Tensor, input_mask: Tensor, label_ids: Tensor, label_mask: Tensor
    ) -> dict[str, Any]:  # fmt: skip
        """The loss in nats, as LlamaForTraining: all arguments (batch, sequence), or pointers to other ranks."""
        with self.backend():
            if not self.chunked:
                out: dict[str, Any] = super().forward(input_ids, input_mask, label_ids, label_mask)
                return out
            hidden = self.last_hidden(input_ids, input_mask).transpose(0, 1).flatten(0, 1)
            head, rows = self.model.lm_head.pp_block.weight, self.fused.loss_rows
            return {"loss": chunked_cross_entropy(hidden, head, label_ids.flatten(), label_mask.flatten(), rows)}

    def last_hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What the head is given: (sequence, batch, hidden)."""
        model = self.model
        x = model.token_position_embeddings(input_ids=ids, input_mask=mask)["input_embeds"]
        state = {"hidden_states": x, "sequence_mask": mask}
        for block in model.decoder:
            state = block(**state)
        last: Tensor = model.final_layer_norm(input=state["hidden_states"])["hidden_states"]
        return last

    def backend(self) -> AbstractContextManager[None]:
        """Allows the attention that was chosen and no other, since PyTorch's order depends on versions, cuDNN's too.

        Where it cannot be had PyTorch raises RuntimeError; on a CPU there is no choice.
        """
        if not (self.fused.attention and torch.cuda.is_available()):
            return nullcontext()
        context: AbstractContextManager[None] = sdpa_kernel(BACKENDS[self.fused.attention])
        return context

    def get_block_compute_costs(self) -> dict[Any, int]:
        """As LlamaForTraining, for the layer that is built."""
        costs: dict[Any, int] = super().get_block_compute_costs()
        return {**costs, FusedLayer: costs[llama.LlamaDecoderLayer]}


def with_parts(fused: Fused) -> type[FusedLlama]:
    """FusedLlama with other parts; Nanotron takes a class."""
    return type("FusedLlama", (FusedLlama,), {"fused": fused})
