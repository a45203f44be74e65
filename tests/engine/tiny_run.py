"""Small runs on disk, and their real training in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from recipes.data.manifest import Manifest
from recipes.files import read_lines
from recipes.loader import load
from recipes.run import Run

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 512
SOURCES = {"prose": "web", "more-prose": "web", "programs": "code"}
RECIPE: dict[str, Any] = {
    "name": "tiny", "seed": 7, "block_tokens": 128, "stages": ["stage1", "stage2"],
    "model": {"layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2, "vocab_size": VOCAB,
              "tied_embeddings": True, "norm_eps": 1.0e-5, "init_std": 0.05, "rope_theta": 10000.0,
              "rope_interleaved": True, "dtype": "bfloat16"},
    "tokenizer": {"name": "tokenizer.json", "vocab_size": VOCAB, "end_of_text": "<|endoftext|>"},
    "batch": {"tokens_per_step": 256, "sequence_length": 32, "micro_batch": 4, "accumulation": 1},
    "parallelism": {"dp": 2, "tp": 1, "pp": 1, "tp_mode": "ALL_REDUCE", "tp_linear_async_communication": False,
                    "pp_engine": "1f1b"},
    "optimizer": {"beta1": 0.9, "beta2": 0.95, "eps": 1.0e-8, "weight_decay": 0.01, "clip": 1.0, "zero_stage": 0,
                  "accumulate_grad_in_fp32": True},
    "schedule": {"peak_lr": 3.0e-3, "min_lr": 0, "warmup_steps": 4, "decay_start_step": 16, "decay_steps": 8},
    "checkpoints": {"interval": 4, "keep_last": 3, "keep_every": 0},
}  # fmt: skip
STAGE1 = {
    "end_step": 12,
    "domains": {
        "web": {"share": 0.75, "sources": {"prose": 0.6, "more-prose": 0.4}},
        "code": {"share": 0.25, "sources": {"programs": 1}},
    },
}
STAGE2 = {
    "end_step": 23, "sequence_length": 64, "micro_batch": 2, "rope_theta": 50000.0,
    "domains": {"web": {"share": 0.5, "sources": {"prose": 1}}, "code": {"share": 0.5, "sources": {"programs": 1}}},
}  # fmt: skip


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, key by key."""
    both = {
        k: merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()
    }
    return {**base, **both}


def write_source(folder: Path, name: str, tokenizer: Path, tokens: int = 3000) -> None:
    """A tokenised folder of one file; a few of its tokens are frequent, which a model learns in a few steps."""
    folder.mkdir(parents=True)
    ids = np.random.default_rng(list(name.encode())).geometric(0.1, tokens) % VOCAB
    ids.astype("<u2").tofile(folder / "00000.ds")
    np.array([tokens], dtype="<u8").tofile(folder / "00000.ds.index")
    Manifest.of_files(
        folder, ["00000.ds"], source=name, tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        vocab_size=VOCAB, end_of_text_id=0, token_bytes=2, config={},
    ).save()  # fmt: skip


def make_run(folder: Path, recipe: dict[str, Any] | None = None, **stages: dict[str, Any]) -> Run:
    """A run of the tiny recipe with `recipe` and `stages` (stage1=…) laid over it, and its data."""
    root = folder / "tree"
    content = merged(RECIPE, recipe or {})
    files = {"stages/tiny/recipe.yaml": content}
    for name, stage in merged({"stage1": STAGE1, "stage2": STAGE2}, stages).items():
        files[f"mixtures/tiny/{name}.yaml"] = {"domains": stage["domains"]}
        files[f"stages/tiny/{name}.yaml"] = {k: v for k, v in stage.items() if k != "domains"}
    registry = {
        name: {"domain": domain, "hub": None, "text": "text", "tokens": 3000} for name, domain in SOURCES.items()
    }
    files["mixtures/sources.yaml"] = {"sources": registry}
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(yaml.safe_dump(value, sort_keys=False))
    tokenizer = root / "made-with.json"
    words = Tokenizer(WordLevel({f"word{i}": i for i in range(VOCAB)}, unk_token="word0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(tokenizer))
    for name, domain in SOURCES.items():
        write_source(folder / "run" / "data" / name, name, tokenizer)
        if not (folder / "run" / "data" / "heldout" / domain).exists():
            write_source(folder / "run" / "data" / "heldout" / domain, f"heldout-{domain}", tokenizer, 700)
    return Run.create(folder / "run", load(root / "stages" / "tiny"), folder / "run" / "data", tokenizer)


def command(run: Run, stage: str, processes: int | None) -> list[str]:
    """The command that trains a stage: with torchrun, or in one process without it (None)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes else []), "-m", "recipes.train", str(run.folder), stage]


def environment() -> dict[str, str]:
    """One thread a process, so that the order of additions is the same on any number of them."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(run: Run, stage: str, processes: int | None = None, **options: Any) -> subprocess.Popen[str]:
    """Starts training."""
    return subprocess.Popen(
        command(run, stage, processes), env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip


def train(run: Run, stage: str, processes: int | None = None, code: int | None = 0, **options: Any) -> tuple[str, str]:
    """Trains to the end; returns what it printed. `code` is what is expected of a single process, or of torchrun."""
    process = start(run, stage, processes, **options)
    out, err = process.communicate()
    assert code is None or process.returncode == code, out + err
    return out, err


def children(pid: int) -> list[int]:
    """A process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILLs torchrun and its workers, or a single process."""
    process.send_signal(signal.SIGSTOP)
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits until `condition` holds; fails if the process ends before."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def trained(run: Run, stage: str, step: int) -> Callable[[], bool]:
    """Whether metrics.jsonl has got to a step."""
    return lambda: max([0, *losses(run, stage)]) >= step


def metrics(run: Run, stage: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return read_lines(run.stage_folder(stage) / "metrics.jsonl")


def losses(run: Run, stage: str) -> dict[int, float]:
    """Loss by step; every step occurs once."""
    lines = metrics(run, stage)
    result = {line["step"]: line["loss"] for line in lines}
    assert len(result) == len(lines)
    return result


def state(run: Run, stage: str) -> dict[str, Any]:
    """The stage's state.json."""
    content: dict[str, Any] = json.loads((run.stage_folder(stage) / "state.json").read_text())
    return content
