"""Small recipes on disk, made from the real files."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from recipes.data.manifest import Manifest
from recipes.loader import load
from recipes.run import Run

# A shell that starts pytest in the background has it ignore Ctrl-C, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of stages/ and mixtures/ that a test may damage."""
    for folder in ("stages", "mixtures"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


TINY = """
name: tiny
extends: smollm2-1.7b
scale: 1/1_000_000_000
seed: 7
model: {layers: 2, hidden: 64, ffn: 128, heads: 4, kv_heads: 2, vocab_size: 512}
tokenizer: {name: tokenizer.json, vocab_size: 512}
batch: {tokens_per_step: 256, sequence_length: 32, micro_batch: 4}
parallelism: {dp: 2}
checkpoints: {interval: 10, keep_last: 2, keep_every: 0}
block_tokens: 128
branches: []
"""
"""The 1.7B's four stages at 42 steps: 23, 8, 8 and 3."""


def write_source(folder: Path, source: str, sha256: str, tokens: int = 3000) -> None:
    """A tokenised folder of random documents, in two files."""
    rng = np.random.default_rng(list(source.encode()))
    folder.mkdir(parents=True)
    names = ("00000.ds", "00001.ds")
    for name in names:
        ends = np.unique(np.append(rng.integers(1, tokens, 20), tokens)).astype("<u8")
        ids = rng.integers(1, 512, tokens).astype("<u2")
        ids[ends.astype(np.int64) - 1] = 0
        ids.tofile(folder / name)
        ends.tofile(folder / f"{name}.index")
    Manifest.of_files(
        folder,
        names,
        source=source,
        tokenizer_sha256=sha256,
        vocab_size=512,
        end_of_text_id=0,
        token_bytes=2,
        config={},
    ).save()


@pytest.fixture
def tiny_run(tree: Path, tmp_path: Path) -> Run:
    """A run of a tiny recipe with data for every source, nothing trained yet."""
    vocab = {f"t{i}": i for i in range(512)}
    tokenizer = tree / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    folder = tree / "stages" / "tiny"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(TINY)
    recipe = load("tiny", tree)
    sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    for name in {name for stage in recipe.stages for name in stage.mixture.shares}:
        write_source(tmp_path / "runs" / "tiny" / "data" / name, name, sha256)
    run = tmp_path / "runs" / "tiny"
    return Run.create(run, recipe, run / "data", tokenizer)
