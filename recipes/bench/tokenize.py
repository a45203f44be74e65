"""Benchmark of tokenising: ours beside datatrove's own pipeline, a core each, on the same documents."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer
from loguru import logger
from rich.box import SIMPLE_HEAD
from rich.table import Table

from recipes.bench.data import surroundings
from recipes.data.corpus import build_corpora, iter_texts
from recipes.data.manifest import Manifest
from recipes.data.tokenize import tokenize, train_tokenizer
from recipes.files import write_json
from recipes.show import amount, wide_console

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
OURS, THEIRS = "smol tokenize", "datatrove alone"
ROUNDS = 3
"""Each way is taken so often, in turn; the fastest counts: other work on the machine only ever adds time."""


def bench_tokenize(
    tokenizer: Path | None = None, characters: int = 8_000_000, json_path: Path | None = None
) -> dict[str, Any]:  # fmt: skip
    """Tokenises text of this environment's own documentation with one worker each, and prints both speeds.

    Args:
        tokenizer: a tokenizer.json whose end of text is <|endoftext|>; one of 4,096 entries is trained if none.
        characters: of text; fewer where the environment has no more.

    Returns:
        What is written as JSON: seconds, documents and tokens a second of each way, the ratio of the times.

    Raises:
        UserError: the tokenizer does not fit.
    """
    console = wide_console()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with TemporaryDirectory(prefix="smol-bench-") as folder, console.status("tokenising") as status:
        root = Path(folder)
        build_corpora(root / "corpora", {"text": characters}, {}, 0, {"text": "web"})
        if tokenizer is None:
            train_tokenizer(iter_texts(root / "corpora" / "text"), VOCAB_SIZE, END_OF_TEXT, root / "tokenizer.json")
        vocabulary = tokenizer or root / "tokenizer.json"
        ways: dict[str, Callable[[Path, Path, Path], None]] = {OURS: _ours, THEIRS: _datatrove}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for n in range(ROUNDS):
            for name, way in ways.items():
                status.update(f"{name}, round {n + 1} of {ROUNDS}")
                began = time.perf_counter()
                way(root / "corpora" / "text", vocabulary, root / f"{name}-{n}")
                seconds[name].append(time.perf_counter() - began)
        manifest = Manifest.load(root / f"{OURS}-0")
    result = {
        "vocab_size": manifest.vocab_size, "tokens": manifest.tokens, "documents": manifest.documents,
        "ways": {name: _speed(manifest, min(times)) for name, times in seconds.items()},
        "ratio": min(seconds[OURS]) / min(seconds[THEIRS]), **surroundings(),
    }  # fmt: skip
    _show(result)
    if json_path is not None:
        write_json(json_path, result)
    return result


def _ours(data: Path, tokenizer: Path, out: Path) -> None:
    tokenize("text", str(data), out, tokenizer, END_OF_TEXT, show_progress=False)


def _datatrove(data: Path, tokenizer: Path, out: Path) -> None:
    reader = ParquetReader(str(data))
    writer = DocumentTokenizer(str(out), tokenizer_name_or_path=str(tokenizer), eos_token=END_OF_TEXT, seed=0)
    executor = LocalPipelineExecutor([reader, writer], tasks=1, workers=1, logging_dir=str(out / "logs"))
    logger.disable("datatrove")
    executor._run_for_rank(0)  # in this process: `run` would start another


def _speed(manifest: Manifest, seconds: float) -> dict[str, float]:
    return {
        "seconds": seconds, "documents_per_second": manifest.documents / seconds,
        "tokens_per_second": manifest.tokens / seconds,
    }  # fmt: skip


def _show(result: dict[str, Any]) -> None:
    console = wide_console()
    title = f"{amount(result['tokens'])} tokens, a vocabulary of {result['vocab_size']:,}, one core"
    table = Table("", "seconds", "documents/s", "tokens/s", box=SIMPLE_HEAD, title=title)
    for name, speed in result["ways"].items():
        figures = (speed["documents_per_second"], speed["tokens_per_second"])
        table.add_row(name, f"{speed['seconds']:.2f}", *(f"{figure:,.0f}" for figure in figures))
    console.print(table)
    extra = "Ours also starts a process, reads back what it wrote, takes checksums and syncs."
    console.print(f"{result['ratio']:.2f} times datatrove's time. {extra}", highlight=False)
