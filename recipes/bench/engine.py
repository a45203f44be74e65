"""Benchmarks of the engine: a recipe's training step on this machine, and its checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recipes.bench.data import surroundings
from recipes.data.manifest import Manifest, tokenizer_sha256
from recipes.engine.checkpoint import Checkpoint, remove, steps
from recipes.errors import UserError
from recipes.files import read_lines, write_atomic, write_json
from recipes.loader import load
from recipes.plan import flops_per_token
from recipes.recipe import Recipe
from recipes.run import Run, freeze
from recipes.show import bytes_of, wide_console

PARTS = {"data": "reading data", "forward": "forward", "backward": "backward", "step": "optimizer"}
"""A step's parts as engine/timed.py names them, and as they are shown."""
LOOK = 0.5
"""Seconds between two looks at how far training is."""
Timed = dict[str, Any]
"""What engine/timed.py writes."""


def bench_step(
    recipe: str = "smollm2-135m", processes: int = 1, micro_batch: int | None = None, count: int = 10,
    json_path: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains a recipe's first stage for some steps on random tokens, with one micro-batch a step, and prints its speed.

    Args:
        micro_batch: sequences; the recipe's if none.
        count: steps that are timed as they are, and again with their parts apart.

    Returns:
        What is written as JSON.

    Raises:
        UserError: no such recipe; it does not fit this machine.
    """
    loaded, console = load(recipe), wide_console()
    with TemporaryDirectory(prefix="smol-bench-") as folder:
        run = make_run(loaded, Path(folder), processes, micro_batch, 2 * count + 4, interval=1 << 40)
        stage = run.plan.stages[0]
        result = {
            "recipe": recipe, "processes": processes, "micro_batch": stage.micro_batch,
            "sequence_length": stage.sequence_length, **step_figures(train(run, processes, console), run, processes),
            **surroundings(),
        }  # fmt: skip
    show_step(result, console)
    _write(json_path, result)
    return result


def bench_checkpoint(
    recipe: str = "smollm2-135m", processes: int = 1, micro_batch: int | None = 1, json_path: Path | None = None
) -> dict[str, Any]:
    """Writes, verifies and loads a recipe's checkpoints, and prints for how long training stands still.

    Returns:
        What is written as JSON.

    Raises:
        UserError: no such recipe; it does not fit this machine, or its disk.
    """
    loaded, console = load(recipe), wide_console()
    with TemporaryDirectory(prefix="smol-bench-") as folder:
        run = make_run(loaded, Path(folder), processes, micro_batch, 16, interval=4)
        timed = train(run, processes, console)
        checkpoints = run.checkpoints(run.plan.stages[0].name)
        verify_seconds, entries = verify(checkpoints / str(steps(checkpoints)[-1]))
        remove(checkpoints / str(steps(checkpoints)[-1]))
        again = train(run, processes, console)
    result = {
        "recipe": recipe, "processes": processes, **checkpoint_figures(timed), "verify_seconds": verify_seconds,
        "load_seconds": again["load_seconds"], **entries, **surroundings(),
    }  # fmt: skip
    show_checkpoint(result, console)
    _write(json_path, result)
    return result


def make_run(
    base: Recipe, folder: Path, processes: int, micro_batch: int | None, count: int, interval: int
) -> Run:  # fmt: skip
    """A run of a recipe's first stage: its model, sequence length and optimizer, `count` steps of random tokens."""
    stage, size = base.stages[0], base.parallelism.tp * base.parallelism.pp
    if processes % size:
        raise UserError(f"{base.name} has tp × pp = {size}", f"--processes takes a multiple of {size}")
    batch, length = micro_batch or stage.micro_batch, stage.sequence_length
    per_step = processes // size * batch * length
    sources = list(stage.mixture.shares)
    registry = {
        name: {"domain": base.sources[name].domain, "hub": None, "text": "text", "tokens": per_step * count}
        for name in sources
    }  # fmt: skip
    overlay: dict[str, Any] = {
        "name": f"{base.name}-bench", "extends": base.name, "stages": [stage.name], "branches": [],
        "scale": f"{per_step * count}/{(stage.end_step - stage.start_step) * base.tokens_per_step}",
        "batch": {"tokens_per_step": per_step, "micro_batch": batch, "accumulation": 1},
        "parallelism": {"dp": processes // size}, "block_tokens": length, "sources": "mixtures/sources-bench.yaml",
        "checkpoints": {"interval": interval, "keep_last": 3, "keep_every": 0},
    }  # fmt: skip
    freeze(base, folder / "recipe")
    write_atomic(folder / "recipe" / overlay["sources"], yaml.safe_dump({"sources": registry}))
    write_atomic(folder / "recipe" / "stages" / overlay["name"] / "recipe.yaml", yaml.safe_dump(overlay))
    tokenizer = folder / "made-with.json"
    vocabulary = {str(n): n for n in range(base.tokenizer.vocab_size)}
    write_atomic(tokenizer, json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    for name in sources:
        write_random(folder / "data" / name, name, tokenizer, base.tokenizer.vocab_size, per_step * count + 1)
    return Run.create(folder, load(folder / "recipe" / "stages" / overlay["name"]), folder / "data", tokenizer)


def write_random(folder: Path, source: str, tokenizer: Path, vocab_size: int, tokens: int) -> None:
    """A tokenised folder with one file of random tokens."""
    folder.mkdir(parents=True)
    width = 2 if vocab_size <= 1 << 16 else 4
    ids = np.random.default_rng(0).integers(0, vocab_size, tokens)
    ids.astype(f"<u{width}").tofile(folder / "00000.ds")
    np.array([tokens], dtype="<u8").tofile(folder / "00000.ds.index")
    Manifest.of_files(
        folder, ["00000.ds"], source=source, tokenizer_sha256=tokenizer_sha256(tokenizer), vocab_size=vocab_size,
        end_of_text_id=0, token_bytes=width, config={},
    ).save()  # fmt: skip


def train(run: Run, processes: int, console: Console) -> Timed:
    """Trains with engine/timed.py in processes of its own; returns what rank 0 measured.

    Raises:
        UserError: it failed; with the last thing it said.
    """
    out, log, stage = run.folder / "timed.json", run.folder / "timed.log", run.plan.stages[0]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "recipes.engine.timed", str(run.folder), str(out)]
    root = Path(__file__).resolve().parents[2]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    with open(log, "w", encoding="utf-8") as file, console.status("starting") as status:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=variables)
        try:
            while process.poll() is None:
                done = len(read_lines(run.stage_folder(stage.name) / "metrics.jsonl"))
                status.update(f"{run.recipe.name}: {done} of {stage.steps} steps")
                time.sleep(LOOK)
        finally:
            process.terminate()
    if process.wait():
        said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith(("[rank", "error: "))]
        reason = said[-1] if said else f"its log is {log.read_text(encoding='utf-8')[-2000:]}"
        raise UserError(f"training failed: {reason}", "take a smaller recipe or --micro-batch")
    result: Timed = json.loads(out.read_text(encoding="utf-8"))
    return result


def step_figures(timed: Timed, run: Run, processes: int) -> dict[str, Any]:
    """Medians of the steps after the warm-up: as they are, and with their parts apart. Seconds, bytes, tokens a second.

    The last two steps are left out: one is profiled, one is followed by the checkpoint.
    """
    from recipes.engine.timed import WARMUP

    measured = timed["steps"][WARMUP:-2]
    plain = [line["seconds"] for line in measured if not line["split"]]
    split = [line for line in measured if line["split"]]
    seconds, whole = median(plain), median(line["seconds"] for line in split)
    parts = {name: median(line.get(name, 0.0) for line in split) for name in PARTS}
    rate = timed["tokens_per_step"] / seconds
    flops = rate * flops_per_token(run.recipe.model, run.plan.stages[0].sequence_length)
    return {
        "step_seconds": seconds, "fastest": min(plain), "slowest": max(plain), "steps": len(plain),
        "tokens_per_second": rate, "flops_per_second": flops,
        "mfu": flops / (timed["peak_flops"] * processes) if timed["peak_flops"] else None,
        "split_seconds": whole, "parts": parts | {"rest": whole - sum(parts.values())},
        "collectives": sum(timed["collectives"].values()), "checkpoint_stall": timed["checkpoints"][-1]["hold"],
        "memory": timed["memory"], "device_memory": timed["device_memory"], "device": timed["device"],
        "threads": timed["threads"],
    }  # fmt: skip


def checkpoint_figures(timed: Timed) -> dict[str, Any]:
    """The first checkpoint, which training waited for, and the second, which a thread wrote. Seconds and bytes."""
    first, second = timed["checkpoints"][:2]
    steady = timed["steps"][3:]
    beside = [line["seconds"] for line in steady if line["writing"]]
    return {
        "stall_before": first["hold"] + first["write"], "first_hold": first["hold"], "stall": second["hold"],
        "write_alone": first["write"], "write_beside": second["write"],
        "step_seconds": median(line["seconds"] for line in steady if not line["writing"]),
        "step_seconds_beside": median(beside) if beside else None,
        "snapshot_bytes": timed["snapshot_bytes"], "memory": timed["memory"], "device": timed["device"],
    }  # fmt: skip


def verify(folder: Path) -> tuple[float, dict[str, int]]:
    """Reads every byte of a checkpoint: seconds; its bytes and files."""
    began = time.perf_counter()
    checkpoint = Checkpoint.load(folder)
    checkpoint.verify()
    size = sum(entry.bytes for entry in checkpoint.files)
    return time.perf_counter() - began, {"bytes": size, "files": len(checkpoint.files)}


def show_step(result: dict[str, Any], console: Console) -> None:
    """Prints a step's figures."""
    table = Table("", "", "", box=SIMPLE_HEAD, title=f"{Path(result['recipe']).name}, a step on {result['device']}")
    for row in _step_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(_place(result), highlight=False)


def _step_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    whole = result["split_seconds"]
    batch = f"{result['processes']} × {result['micro_batch']} × {result['sequence_length']:,} tokens"
    spread = f"{result['fastest']:.3f} to {result['slowest']:.3f} s over {result['steps']} steps"
    yield "step", f"{result['step_seconds']:.3f} s", f"{batch}; {spread}"
    mfu = f", {result['mfu']:.1%} MFU" if result["mfu"] else "; MFU unknown: no peak for this device"
    yield (
        "speed",
        f"{result['tokens_per_second']:,.0f} tokens/s",
        f"{result['flops_per_second'] / 1e12:.3g} TFLOP/s{mfu}",
    )
    for name, shown in [*PARTS.items(), ("rest", "rest: clipping, metrics, agreement")]:
        yield shown, f"{result['parts'][name]:.4f} s", f"{result['parts'][name] / whole:.1%} of {whole:.3f} s"
    overlap = "profiled in one step; inside the backward pass where they overlap"
    yield "collectives", f"{result['collectives']:.4f} s", overlap
    yield "checkpoint", f"{result['checkpoint_stall']:.3f} s", "training stands still, with buffers that are new"
    device = f"; {bytes_of(result['device_memory'])} on the device" if result["device_memory"] else ""
    yield "peak memory", f"{bytes_of(result['memory'])}{device}", "of the first process, its start included"


def show_checkpoint(result: dict[str, Any], console: Console) -> None:
    """Prints a checkpoint's figures."""
    title = f"{Path(result['recipe']).name}, a checkpoint of {bytes_of(result['bytes'])} in {result['files']:,} files"
    table = Table("", "seconds", "", box=SIMPLE_HEAD, title=title)
    rate = result["snapshot_bytes"] / max(result["stall"], 1e-9) / 1e9
    beside, verified = result["step_seconds_beside"], result["bytes"] / result["verify_seconds"] / 1e9
    rows = [
        ("stall, written by training itself", result["stall_before"], "copy, write, checksum, sync"),
        ("stall, written by a thread", result["stall"],
         f"{result['stall_before'] / result['stall']:.1f} times less; {rate:.1f} GB/s into host memory"),
        ("the same, the first time", result["first_hold"], "the buffers are new"),
        ("the thread's work", result["write_beside"], f"{result['write_alone']:.2f} s with nothing beside it"),
        ("a step beside it", beside, f"{result['step_seconds']:.3f} s otherwise"),
        ("verify", result["verify_seconds"], f"{verified:.1f} GB/s, from the page cache"),
        ("load", result["load_seconds"], "weights, optimizer, schedule"),
    ]  # fmt: skip
    for what, seconds, remark in rows:
        table.add_row(what, "none ended" if seconds is None else f"{seconds:.3f}", remark)
    console.print(table)
    console.print(_place(result), highlight=False)


def _place(result: dict[str, Any]) -> str:
    code, versions = result["code"], result["versions"]
    changed = ", with changes" if code["changed"] else ""
    machine = f"{result['machine']['processor']}, {result['machine']['cores']} cores, load {result['load']:.1f}"
    return f"{machine}; Python {versions['python']}; code {code['revision'] or 'outside git'}{changed}."


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, result)
