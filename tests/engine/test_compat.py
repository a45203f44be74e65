"""The layer under Nanotron, each case in a process of its own: importing it changes PyTorch for good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.tiny_run import environment

pytestmark = pytest.mark.slow

FLASH_ATTN = {
    "__init__.py": "bert_padding = None",
    "flash_attn_interface.py": """
def flash_attn_varlen_func(window_size): "the real one"
flash_attn_with_kvcache = None
""",
    "layers/__init__.py": "",
    "layers/rotary.py": "class RotaryEmbedding: pass",
    "ops/__init__.py": "",
    "ops/triton/__init__.py": "",
    "ops/triton/layer_norm.py": "layer_norm_fn = None",
}


def python(code: str, path: Path | None = None) -> str:
    """Runs code in a new process; returns what it prints."""
    variables = environment()
    if path is not None:
        variables["PYTHONPATH"] += f":{path}"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def flash_attn(tmp_path: Path) -> Path:
    """A folder with an importable flash_attn that is not the stand-in."""
    for name, content in FLASH_ATTN.items():
        (tmp_path / "flash_attn" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "flash_attn" / name).write_text(content)
    return tmp_path


def test_nanotron_alone_cannot_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", "import nanotron.trainer"], env=environment(), capture_output=True)
    assert b"circular import" in done.stderr


def test_without_gpu_and_flash_attn_both_are_replaced_and_nothing_is_left_behind() -> None:
    print_all = """
import recipes.engine.compat as compat, sys, torch, numpy
import nanotron.trainer, nanotron.models.llama as llama
assert not {"datasets", "transformers", "pandas"} & set(sys.modules)
assert llama.flash_attn_varlen_func is compat.flash_attn_varlen_func
assert torch.ones(2, device="cuda").device.type == "cpu" and torch.ones(2).to(torch.device("cuda")).device.type == "cpu"
import datasets
from transformers import LlamaForCausalLM, LlamaConfig
LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
print(compat.replaced, [m for m in sys.modules if m.startswith("flash_attn")], (numpy.int64(256), 2))
"""
    assert python(print_all) == "['flash_attn', 'cuda'] [] (256, 2)"


def test_with_gpu_and_flash_attn_nothing_is_replaced(flash_attn: Path) -> None:
    code = """
import torch, torch.distributed, sys
before = [torch.cuda.set_device, torch.cuda.synchronize, torch.distributed.all_reduce, torch.distributed.isend]
torch.cuda.is_available = lambda: True
import recipes.engine.compat as compat
import nanotron.distributed as dist, nanotron.models.llama as llama
after = [torch.cuda.set_device, torch.cuda.synchronize, dist.all_reduce, dist.isend]
assert before == after and dist.send is torch.distributed.send
assert dist.initialize_torch_distributed.__module__ == "nanotron.distributed"
assert llama.RotaryEmbedding.init_rotary_embeddings.__module__ == "nanotron.models.llama"
assert llama.flash_attn_varlen_func.__doc__ == "the real one" and "flash_attn" in sys.modules
try:
    torch.ones(2, device="cuda")
except (AssertionError, RuntimeError) as error:
    print(compat.replaced, "cuda is asked for")
"""
    assert python(code, flash_attn) == "[] cuda is asked for"


def test_with_flash_attn_alone_only_cuda_is_replaced(flash_attn: Path) -> None:
    code = "import recipes.engine.compat as c, sys; print(c.replaced, sys.modules['flash_attn'].__file__ is None)"
    assert python(code, flash_attn) == "['cuda'] False"


def test_attention_stand_in_is_attention() -> None:
    code = """
import recipes.engine.compat as compat, torch
torch.manual_seed(0)
batch, length, heads, kv_heads, d = 3, 7, 6, 2, 4
q, k, v = (torch.randn(batch * length, n, d, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
ends = torch.arange(batch + 1) * length
for causal in (False, True):
    out = compat.flash_attn_varlen_func(q, k, v, ends, ends, length, length, causal=causal)
    for b in range(batch):
        rows = slice(b * length, (b + 1) * length)
        for h in range(heads):
            scores = q[rows, h] @ k[rows, h // (heads // kv_heads)].T / d**0.5
            if causal:
                scores += torch.full((length, length), float("-inf")).triu(1)
            expected = scores.softmax(-1) @ v[rows, h // (heads // kv_heads)]
            torch.testing.assert_close(out[rows, h], expected)
refused = 0
for lengths, options in [((length, length), {"window_size": (4, 0)}), ((length, length), {"return_attn_probs": True}),
                         ((length + 1, length), {}), ((length, length + 1), {})]:
    try:
        compat.flash_attn_varlen_func(q, k, v, ends, ends, *lengths, **options)
    except NotImplementedError:
        refused += 1
print(refused)
"""
    assert python(code) == "4"


def test_rotary_stand_in_turns_pairs_by_their_angle() -> None:
    code = """
import recipes.engine.compat as compat, torch
torch.manual_seed(0)
q, kv = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 2, 1, 8)
angles = torch.arange(5)[:, None] * 50.0 ** -(torch.arange(4) / 4)
turn = torch.polar(torch.ones_like(angles), angles)[:, None]
for interleaved in (True, False):
    pairs = lambda x: x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).transpose(-1, -2)
    turned = lambda x: torch.view_as_real(torch.view_as_complex(pairs(x).contiguous()) * turn)
    new_q, new_kv = compat.RotaryEmbedding(8, base=50.0, interleaved=interleaved)(q, kv)
    torch.testing.assert_close(pairs(new_q), turned(q))
    torch.testing.assert_close(pairs(new_kv[:, :, 0]), turned(kv[:, :, 0]))
    assert torch.equal(new_kv[:, :, 1], kv[:, :, 1])
low = compat.RotaryEmbedding(8, interleaved=True)(q.bfloat16(), kv.bfloat16())[0]
print(low.dtype)
"""
    assert python(code) == "torch.bfloat16"


def test_norm_stand_in_is_the_norm() -> None:
    code = """
import recipes.engine.compat as compat, torch
torch.manual_seed(0)
x, weight, bias = torch.randn(4, 8), torch.randn(8), torch.randn(8)
rms = x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight
torch.testing.assert_close(compat.layer_norm_fn(x, weight, None, eps=1e-3, is_rms_norm=True), rms)
plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt() * weight + bias
torch.testing.assert_close(compat.layer_norm_fn(x, weight, bias, eps=1e-3), plain)
try:
    compat.layer_norm_fn(x, weight, bias, residual=x)
except NotImplementedError:
    print("refused")
"""
    assert python(code) == "refused"
