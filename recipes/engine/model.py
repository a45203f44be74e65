"""Nanotron's Llama with the RoPE theta that 0.4's own configuration lacks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import recipes.engine.compat  # noqa: F401  before nanotron

# isort: split
import nanotron.models.llama as llama
from nanotron.config import LlamaConfig

_FlashRotaryEmbedding, _RotaryEmbedding = llama.FlashRotaryEmbedding, llama.RotaryEmbedding


@dataclass
class RopeLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """LlamaConfig with `rope_theta`."""

    rope_theta: float = 10000.0
    is_rope_llama_config: bool = True
    """Only here to be unknown to LlamaConfig; see engine/config.py."""


class RopeLlama(llama.LlamaForTraining):  # type: ignore[misc]
    """LlamaForTraining whose layers, built after this constructor, rotate with the configuration's theta."""

    def __init__(self, config: RopeLlamaConfig, **kwargs: Any) -> None:
        """`kwargs` are LlamaForTraining's."""
        llama.FlashRotaryEmbedding = functools.partial(_FlashRotaryEmbedding, base=config.rope_theta)
        llama.RotaryEmbedding = functools.partial(_RotaryEmbedding, theta=config.rope_theta)
        super().__init__(config=config, **kwargs)
