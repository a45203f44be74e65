"""Runs unmodified Nanotron 0.4 on today's PyTorch, with or without flash-attn, with or without a GPU.

Import this before anything from `nanotron`. What it replaces, and when:

1. the import cycle between `nanotron.logging` and `nanotron.config`: always, no import order avoids it;
2. NumPy 2's `np.int64(256)` in texts, which Nanotron writes into checkpoints and cannot read back: always;
3. `datasets` and `transformers`, which Nanotron's own data loader imports and nothing here uses: left out, always;
4. `flash_attn`, by PyTorch's own attention: only where flash-attn is not installed;
5. "cuda" by "cpu" and NCCL by gloo: only where there is no CUDA device.

PyTorch's warnings that Nanotron calls what will be renamed are switched off: they can only be heeded there.

`replaced` names what this process replaced.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

replaced: list[str] = []
"""Of "flash_attn" and "cuda", those that are missing here and were replaced."""


# 1. The import cycle


def _break_import_cycle() -> None:
    """Lets `nanotron.logging` import an annotation from an empty `nanotron.config`, then imports the real one."""
    names = ("nanotron.config", "nanotron.config.config")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[1]].__dict__["LoggingArgs"] = None
    importlib.import_module("nanotron.logging")
    for name in names:
        del sys.modules[name]
    importlib.import_module("nanotron.config")


# 3. What only Nanotron's own data loader needs


def _leave_out_datasets() -> None:
    """Imports Nanotron's data loader as where `datasets` is not installed: it says so, and does without.

    `datasets` and `transformers` are 800 modules, 40 % of a training process's start.
    """
    if "datasets" not in sys.modules:
        sys.modules["datasets"] = None  # type: ignore[assignment]  # makes `import datasets` an ImportError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("nanotron.dataloader")
        del sys.modules["datasets"]


# 4. flash_attn in plain PyTorch


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Sequence[int] = (-1, -1), return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """flash-attn's function of that name, for rows of equal length: training on full sequences has no others.

    Args:
        q: (batch * sequence, heads, d).
        k, v: (batch * sequence, kv_heads, d); kv_heads divides heads.

    Returns:
        (batch * sequence, heads, d).

    Raises:
        NotImplementedError: rows of different lengths, a window, returned probabilities, causal with other key lengths.
    """
    batch = len(cu_seqlens_q) - 1
    if q.shape[0] != batch * max_seqlen_q or k.shape[0] != batch * max_seqlen_k:
        raise NotImplementedError("the flash_attn stand-in needs unpadded, equally long sequences")
    if tuple(window_size) != (-1, -1) or return_attn_probs or (causal and max_seqlen_q != max_seqlen_k):
        raise NotImplementedError("the flash_attn stand-in does plain self-attention only")
    q, k, v = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout_p, scale=softmax_scale, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


class RotaryEmbedding(torch.nn.Module):
    """flash-attn's class of that name: angles in fp32, table in the input's dtype, arithmetic in fp32."""

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        """`dim` of a head; `interleaved` rotates neighbours (0, 1), (2, 3) …, else the two halves."""
        super().__init__()
        self.dim, self.base, self.interleaved = dim, base, interleaved
        self._table: dict[Any, tuple[Tensor, Tensor]] = {}

    def _cos_sin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = (x.shape[1], x.dtype, x.device, self.base)
        if key not in self._table:
            exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=x.device) / self.dim
            positions = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
            angles = torch.outer(positions, self.base**-exponents)
            cos, sin = (table.to(x.dtype).float()[:, None] for table in (angles.cos(), angles.sin()))
            self._table = {key: (cos, sin)}
        return self._table[key]

    def _rotate(self, x: Tensor) -> Tensor:
        cos, sin = self._cos_sin(x)
        y = x.float()
        a, b = (y[..., ::2], y[..., 1::2]) if self.interleaved else y.chunk(2, -1)
        a, b = a * cos - b * sin, a * sin + b * cos
        y = torch.stack((a, b), -1).flatten(-2) if self.interleaved else torch.cat((a, b), -1)
        return y.to(x.dtype)

    def forward(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates q (batch, sequence, heads, dim) and the keys in kv (batch, sequence, 2, kv_heads, dim)."""
        k, v = kv.unbind(2)
        return self._rotate(q), torch.stack((self._rotate(k), v), 2)


def layer_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-6,
    dropout_p: float = 0.0, prenorm: bool = False, residual_in_fp32: bool = False, is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor:  # fmt: skip
    """flash-attn's function of that name without its fused residual and dropout; statistics in fp32.

    Raises:
        NotImplementedError: a residual, dropout, prenorm or a dropout mask.
    """
    if residual is not None or dropout_p or prenorm or return_dropout_mask:
        raise NotImplementedError("the flash_attn stand-in normalises only")
    weight, bias = weight.float(), None if bias is None else bias.float()
    if is_rms_norm:
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


def _import_models_without_flash_attn() -> None:
    """Imports every Nanotron module that asks for flash_attn, then takes the stand-in away.

    Left in `sys.modules`, transformers and TRL would take it for the real one.
    """
    contents: dict[str, dict[str, Any]] = {
        "": {"bert_padding": None},  # generation only
        ".flash_attn_interface": {
            "flash_attn_varlen_func": flash_attn_varlen_func,
            "flash_attn_with_kvcache": None,  # generation only
        },
        ".layers": {},
        ".layers.rotary": {"RotaryEmbedding": RotaryEmbedding},
        ".ops": {},
        ".ops.triton": {},
        ".ops.triton.layer_norm": {"layer_norm_fn": layer_norm_fn},
    }
    for name, values in contents.items():
        sys.modules["flash_attn" + name] = types.ModuleType("flash_attn" + name)
        sys.modules["flash_attn" + name].__dict__.update(values)
    for model in ("llama", "starcoder2"):
        importlib.import_module(f"nanotron.models.{model}")
    for name in contents:
        del sys.modules["flash_attn" + name]


# 5. No GPU


class _CudaMeansCpu(TorchFunctionMode):
    """Every torch function that is given the device "cuda" gets "cpu"."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(_on_cpu, args), **{key: _on_cpu(value) for key, value in (kwargs or {}).items()})


def _on_cpu(value: Any) -> Any:
    is_cuda = value.type == "cuda" if isinstance(value, torch.device) else isinstance(value, str) and value == "cuda"
    return torch.device("cpu") if is_cuda else value


def _init_rotary_embeddings(self: Any) -> None:
    """That method of Nanotron's own RotaryEmbedding (used in generation) without the assertion that it is on CUDA."""
    if not self._initialized_buffer:
        inverse = self.theta ** -(torch.arange(0, self.dim, 2, dtype=torch.float) / self.dim)
        angles = torch.outer(torch.arange(self.end).float(), inverse)
        self.register_buffer("freqs_cis", torch.stack((angles.cos(), angles.sin()), -1), persistent=False)
        self._initialized_buffer = True


class _BufferedSend:
    """A send that is done at once: NCCL's small ones are, 1F1B leans on it and deadlocks on gloo's."""

    pending: ClassVar[list[tuple[Any, Tensor]]] = []

    def __init__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        self.pending[:] = [(work, copy) for work, copy in self.pending if not work.is_completed()]
        copy = tensor.detach().clone()
        self.pending.append((torch.distributed.isend(copy, *args, **kwargs), copy))

    def wait(self) -> bool:
        """As of a torch.distributed work handle."""
        return True


def _init_gloo() -> None:
    torch.distributed.init_process_group("gloo")


def _run_without_cuda() -> None:
    """For the rest of the process, in the thread that imports this module."""
    distributed: Any = importlib.import_module("nanotron.distributed")
    llama: Any = importlib.import_module("nanotron.models.llama")
    for name in ("set_device", "synchronize", "reset_peak_memory_stats"):
        # A function for each: torch._dynamo refuses one object under two names.
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    distributed.initialize_torch_distributed = _init_gloo
    distributed.send = distributed.isend = _BufferedSend
    # gloo's average divides in place, which autograd refuses for parameters.
    distributed.all_reduce = torch.no_grad()(torch.distributed.all_reduce)
    llama.RotaryEmbedding.init_rotary_embeddings = _init_rotary_embeddings
    _CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]


def _install() -> None:
    _break_import_cycle()
    np.set_printoptions(legacy="1.25")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"nanotron\.|torch\.distributed\.")
    _leave_out_datasets()
    if importlib.util.find_spec("flash_attn") is None:
        _import_models_without_flash_attn()
        replaced.append("flash_attn")
    if not torch.cuda.is_available():
        _run_without_cuda()
        replaced.append("cuda")


_install()
