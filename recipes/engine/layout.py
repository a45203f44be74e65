"""A Llama's shape, and where Nanotron 0.4 and transformers keep its parameters.

Nanotron has q, k and v in one parameter [q|k|v], gate and up in one [gate|up]. It rotates neighbours (2i, 2i+1),
transformers the two halves (i, i + d/2): the rows of q and k change places within each head.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.errors import UserError


@dataclass(frozen=True)
class Llama:
    """What both formats say about a model, under the names that both use."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    rms_norm_eps: float
    max_position_embeddings: int
    initializer_range: float
    rope_theta: float

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Llama:
        """The shape in a checkpoint's model_config.json.

        Raises:
            UserError: there is none, or it is not of a model that this repository trains.
        """
        path = folder / "model_config.json"
        if not path.is_file():
            fix = "convert a checkpoint that a stage has written; step 0 holds weights only"
            raise UserError("the checkpoint does not say what model it is of", fix, path)
        config = read_json(path)
        if missing := [field.name for field in fields(cls) if field.name not in config]:
            raise UserError(f"no {missing[0]}", "convert a checkpoint that `smol` has written", path)
        refuse(config, {"hidden_act": "silu", "rope_scaling": None, "rope_interleaved": True}, path)
        return cls(**{field.name: config[field.name] for field in fields(cls)})

    @classmethod
    def of_transformers(cls, folder: Path) -> Llama:
        """The shape in a transformers model's config.json.

        Raises:
            UserError: there is none, or it is of a model that Nanotron's Llama cannot represent.
        """
        from transformers import LlamaConfig

        path = folder / "config.json"
        if not path.is_file():
            raise UserError("no transformers model: it has no config.json", "name a model's folder", folder)
        config = read_json(path)
        refuse(
            config, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": None}, path
        )
        try:
            config = LlamaConfig.from_dict(config).to_dict()
        except Exception as error:  # transformers has many
            raise UserError(f"transformers cannot read it ({error})", "restore the file", path) from None
        rope = config["rope_parameters"]
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        wanted = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "head_dim": head_dim}
        refuse(config, wanted, path)
        refuse(rope, {"rope_type": "default", "partial_rotary_factor": 1.0}, path)
        shape = {field.name: config.get(field.name) for field in fields(cls)}
        return cls(**{**shape, "rope_theta": float(rope["rope_theta"])})

    @property
    def parameters(self) -> list[Parameter]:
        """Every parameter, from the embeddings to the head."""
        d = self.hidden_size // self.num_attention_heads
        q, kv = self.num_attention_heads, self.num_key_value_heads
        hidden, ffn = self.hidden_size, self.intermediate_size
        result = [Parameter.plain("token_position_embeddings/pp_block/token_embedding", "model.embed_tokens",
                                  self.vocab_size, hidden)]  # fmt: skip
        for i in range(self.num_hidden_layers):
            here, there = f"decoder/{i}/pp_block", f"model.layers.{i}"
            attention = tuple(f"{there}.self_attn.{x}_proj.weight" for x in "qkv")
            gated = (f"{there}.mlp.gate_proj.weight", f"{there}.mlp.up_proj.weight")
            result += [
                Parameter.norm(f"{here}/input_layernorm", f"{there}.input_layernorm", hidden),
                Parameter(f"{here}/attn/qkv_proj", attention, (q * d, kv * d, kv * d), hidden, (q, kv, 0)),
                Parameter.plain(f"{here}/attn/o_proj", f"{there}.self_attn.o_proj", hidden, hidden),
                Parameter.norm(f"{here}/post_attention_layernorm", f"{there}.post_attention_layernorm", hidden),
                Parameter(f"{here}/mlp/gate_up_proj", gated, (ffn, ffn), hidden, (0, 0)),
                Parameter.plain(f"{here}/mlp/down_proj", f"{there}.mlp.down_proj", hidden, ffn),
            ]
        result.append(Parameter.norm("final_layer_norm/pp_block", "model.norm", hidden))
        if not self.tie_word_embeddings:
            result.append(Parameter.plain("lm_head/pp_block", "lm_head", self.vocab_size, hidden))
        return result


@dataclass(frozen=True)
class Parameter:
    """One parameter of Nanotron's model, and the tensors of transformers' that it holds one above the other."""

    folder: str
    """Below `model/model` of a checkpoint."""
    names: tuple[str, ...]
    rows: tuple[int, ...]
    """Of each tensor."""
    columns: int | None
    """None: a vector, which Nanotron does not shard."""
    heads: tuple[int, ...]
    """Of each tensor that is rotated; else 0."""

    @classmethod
    def plain(cls, folder: str, name: str, rows: int, columns: int) -> Parameter:
        """A matrix that is one tensor in both formats."""
        return cls(folder, (f"{name}.weight",), (rows,), columns, (0,))

    @classmethod
    def norm(cls, folder: str, name: str, size: int) -> Parameter:
        """A vector of scales."""
        return cls(folder, (f"{name}.weight",), (size,), None, (0,))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return (sum(self.rows),) if self.columns is None else (sum(self.rows), self.columns)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of transformers' tensors."""
        return {name: (rows, *self.shape[1:]) for name, rows in zip(self.names, self.rows, strict=True)}

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Nanotron's parameter as transformers' tensors, which share no memory."""
        if len(self.names) == 1:
            return {self.names[0]: whole}
        parts = zip(self.names, torch.split(whole, list(self.rows)), self.heads, strict=True)
        return {name: (halves(w, heads) if heads else w).clone() for name, w, heads in parts}

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """Transformers' tensors, in the order of `names`, as Nanotron's parameter."""
        parts = zip(tensors, self.heads, strict=True)
        return torch.cat([neighbours(w, heads) if heads else w for w, heads in parts])


def halves(w: Tensor, heads: int) -> Tensor:
    """Rows of each head from rotary pairs (2i, 2i+1), as Nanotron 0.4 rotates, to (i, i + d/2), as transformers does.

    Args:
        w: (heads * d, columns), d even.
    """
    return w.reshape(heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def neighbours(w: Tensor, heads: int) -> Tensor:
    """The inverse of `halves`."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def refuse(config: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raises UserError for the first key that is there with another value."""
    for key, value in wanted.items():
        if (there := config.get(key, value)) != value:
            found = f"{key} is {there}, and Nanotron 0.4's Llama knows {value} only"
            raise UserError(found, "convert another model", path)


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError if the file is not JSON."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not JSON ({error})", "restore the file", path) from None
    return content
