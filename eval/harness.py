"""Evaluates a checkpoint: converts it, runs each benchmark of a suite in a process of its own, writes a scorecard.

A benchmark's result file is the mark that it is done: what was interrupted or has crashed is run again by the same
command, and nothing else. Each process has one device: lighteval's own data parallelism mixes up samples.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from eval import benchmarks as tasks
from eval.scorecard import Result, Score, Scorecard, mean
from eval.soundness import scores_of
from eval.suite import Benchmark, Suite
from recipes.engine.checkpoint import MANIFEST, Checkpoint
from recipes.errors import UserError
from recipes.files import checksum, list_files, write_json
from recipes.loader import find_root
from recipes.run import RUN_FILE, Run, runs_folder

DEFAULT_SUITE = "between-stages"
"""Its scorecards are named `<stage>-<step>.json`; other suites' names follow after a point."""
CONVERSION = "conversion.json"
_PERCENT = re.compile(rb"(\d+)%\|")


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a checkpoint of a run, or a model in transformers' format."""

    recipe: str
    """Of a model folder its name; so is the stage."""
    stage: str
    step: int
    tokens: int
    hash: str
    """xxh3-128 of the checkpoint's manifest, or of a model folder's listing."""
    path: Path
    work: Path
    """Where the converted model, results, details and logs go."""
    run: Run | None = None

    @property
    def name(self) -> str:
        """`<stage>-<step>`."""
        return f"{self.stage}-{self.step}"


@dataclass(frozen=True)
class Options:
    """How to evaluate; none of it changes a score but `data_root`."""

    data_root: Path | None = None
    """Folder of local datasets, one a benchmark; the Hub's if none."""
    allow_code: bool = False
    """Whether programs that the model wrote may be run."""
    devices: tuple[str, ...] = ("cpu",)
    """One process at a time on each."""
    batch_size: int = 8
    scores: Path | None = None
    """Folder of the scorecards; eval/scores/<recipe> if none."""


class Incomplete(Exception):
    """Some benchmarks crashed; the others' results are kept. The text names them and their logs."""


def devices(jobs: int | None = None) -> tuple[str, ...]:
    """Every CUDA device, or `jobs` processes on the CPU (2 if there are as many cores)."""
    import torch

    if count := torch.cuda.device_count():
        return tuple(f"cuda:{n}" for n in range(count))
    return ("cpu",) * (jobs or min(2, os.cpu_count() or 1))


def subject_of(path: Path) -> Subject:
    """What lies at `path`.

    Raises:
        UserError: neither a checkpoint inside a run nor a model folder; a checkpoint that is damaged.
    """
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file():
        listing = json.dumps([asdict(entry) for entry in list_files(path)])
        from xxhash import xxh3_128_hexdigest

        name = path.resolve().name
        work = runs_folder() / "models" / name / "eval"
        return Subject(name, name, 0, 0, xxh3_128_hexdigest(listing.encode()), path, work)
    checkpoint = Checkpoint.load(path)
    folder = path.resolve().parents[2]
    if not (folder / RUN_FILE).is_file():
        fix = "name a checkpoint at runs/<run>/<stage>/checkpoints/<step>, or convert it and name the model's folder"
        raise UserError("this checkpoint lies in no run: its tokenizer is unknown", fix, path)
    run = Run.load(folder)
    tokens = checkpoint.step * run.recipe.tokens_per_step
    work = folder / "eval" / f"{checkpoint.stage}-{checkpoint.step}"
    hash = checksum(path / MANIFEST)
    return Subject(checkpoint.recipe, checkpoint.stage, checkpoint.step, tokens, hash, path, work, run)


def scores_folder(subject: Subject, options: Options) -> Path:
    """Where the subject's scorecards go."""
    if options.scores is not None:
        return options.scores
    return scores_of(subject.run) if subject.run else find_root() / "eval" / "scores" / subject.recipe


def scorecard_path(subject: Subject, suite: str, options: Options) -> Path:
    """The scorecard's file."""
    suffix = "" if suite in (DEFAULT_SUITE, "rehearsal") else f".{suite}"
    return scores_folder(subject, options) / f"{subject.name}{suffix}.json"


def evaluate(
    subject: Subject, suite: Suite, options: Options, console: Console, only: Sequence[str] = ()
) -> Scorecard | None:
    """Runs what has no result yet and writes the scorecard as soon as no benchmark is missing; returns it.

    Args:
        only: run no others; several processes may so share a suite.

    Raises:
        UserError: the checkpoint, the data or the arguments are wrong; nothing was run.
        Incomplete: benchmarks crashed.
        KeyboardInterrupt: finished results are kept.
    """
    names = list(only or suite.benchmarks)
    check(suite, names, options)
    keys = {name: _key(subject, suite, name, options) for name in suite.benchmarks}
    with contextlib.ExitStack() as locks:
        for name in names:
            locks.enter_context(_locked(_file(subject, suite, name, ".lock"), f"{name} of this checkpoint"))
        missing = [name for name in names if _finished(subject, suite, name, keys[name]) is None]
        if missing:
            _run_all(subject, suite, missing, keys, options, console)
    found = {name: _finished(subject, suite, name, key) for name, key in keys.items()}
    if crashed := [name for name in names if found[name] is None]:
        logs = {name: _file(subject, suite, name, ".log") for name in crashed}
        told = "".join(f"\n  {name}: {_last_line(log)} ({log})" for name, log in logs.items())
        kept = "the others' results are kept, and the same command runs only these again"
        raise Incomplete(f"{len(crashed)} of {len(names)} benchmarks crashed; {kept}:{told}")
    results = {name: result for name, result in found.items() if result is not None}
    if lacking := [name for name in found if name not in results]:
        console.print(f"{subject.name}: no scorecard yet, no result of {', '.join(lacking)}", highlight=False)
        return None
    card = _scorecard(subject, suite, results)
    card.save(scorecard_path(subject, suite.name, options))
    return card


def check(suite: Suite, names: Sequence[str], options: Options) -> None:
    """Raises UserError for a benchmark that the suite lacks, data that is missing or wrong, and code not allowed."""
    for name in names:
        if name not in suite.benchmarks:
            raise UserError(f"{suite.name} has no benchmark '{name}'", f"name one of {', '.join(suite.benchmarks)}")
        if name == "humaneval" and not options.allow_code:
            fix = "add --allow-code (docs/evaluation.md says what shields the machine), or take a suite without it"
            raise UserError("humaneval runs programs that the model has written", fix)
        tasks.check_data(name, options.data_root, suite.benchmarks[name].shots)


def model_folder(subject: Subject) -> Path:
    """The model in transformers' format, converted if need be."""
    if subject.run is None:
        return subject.path
    from recipes.engine.convert import to_transformers

    model = subject.work / "model"
    with _locked(subject.work / "model.lock", "this checkpoint", wait=True):
        note = model / CONVERSION
        if model.exists() and (not note.is_file() or json.loads(note.read_bytes()).get("manifest") != subject.hash):
            shutil.rmtree(model)  # of an earlier training of the same step
        return to_transformers(subject.path, model)


# ------------------------------------------------------------------ results
def _file(subject: Subject, suite: Suite, benchmark: str, suffix: str) -> Path:
    return subject.work / suite.name / f"{benchmark}{suffix}"


def _key(subject: Subject, suite: Suite, name: str, options: Options) -> dict[str, Any]:
    """Everything a result depends on: another key means another result."""
    benchmark = suite.benchmarks[name]
    return {
        "checkpoint": subject.hash, "task_file": tasks.task_file_hash(), "seed": tasks.SEED,
        "shots": benchmark.shots, "limit": benchmark.limit, "data": tasks.data_identity(name, options.data_root),
    }  # fmt: skip


def _finished(subject: Subject, suite: Suite, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
    """The benchmark's result, if there is one of this key."""
    path = _file(subject, suite, name, ".json")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return result if result.get("key") == key else None


def _scorecard(subject: Subject, suite: Suite, results: dict[str, dict[str, Any]]) -> Scorecard:
    some = next(iter(results.values()))
    return Scorecard(
        recipe=subject.recipe, stage=subject.stage, step=subject.step, tokens=subject.tokens, suite=suite.name,
        seed=tasks.SEED, checkpoint=subject.hash, task_file=some["key"]["task_file"],
        benchmarks={name: _result(suite.benchmarks[name], result) for name, result in results.items()},
        versions=some["versions"], date=max(result["date"] for result in results.values()),
    )  # fmt: skip


def _result(benchmark: Benchmark, content: dict[str, Any]) -> Result:
    subtasks = {name: {m: Score(**s) for m, s in by_metric.items()} for name, by_metric in content["subtasks"].items()}
    metrics = next(iter(subtasks.values()))
    return Result(
        metric=benchmark.metric, shots=benchmark.shots, limit=benchmark.limit, version=content["version"],
        scores={metric: mean(scores[metric] for scores in subtasks.values()) for metric in metrics},
        subtasks=subtasks if len(subtasks) > 1 else {}, data=content["key"]["data"],
    )  # fmt: skip


# ------------------------------------------------------------------ processes
def _run_all(
    subject: Subject, suite: Suite, names: list[str], keys: dict[str, dict[str, Any]], options: Options,
    console: Console,
) -> None:  # fmt: skip
    """Runs the benchmarks, one process on each device, until all have ended."""
    model = model_folder(subject)
    waiting, free = list(names), list(options.devices)
    running: dict[subprocess.Popen[bytes], tuple[str, str, TaskID]] = {}
    with _bars(console) as bars:
        overall = bars.add_task(f"{subject.name} {suite.name}", total=len(names))
        try:
            while waiting or running:
                while waiting and free:
                    name, device = waiting.pop(0), free.pop(0)
                    process = _start(subject, suite, name, model, device, options)
                    running[process] = (name, device, bars.add_task(f"  {name}", total=100))
                for process in [p for p in running if p.poll() is not None]:
                    name, device, bar = running.pop(process)
                    free.append(device)
                    _keep(subject, suite, name, keys[name], process.returncode)
                    bars.remove_task(bar)
                    bars.advance(overall)
                for name, _, bar in running.values():
                    bars.update(bar, completed=_percent(_file(subject, suite, name, ".log")))
                time.sleep(0.1)
        finally:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _start(
    subject: Subject, suite: Suite, name: str, model: Path, device: str, options: Options
) -> subprocess.Popen[bytes]:
    """Starts the process of one benchmark; its output goes to `<benchmark>.log`."""
    benchmark = suite.benchmarks[name]
    log, out = _file(subject, suite, name, ".log"), _file(subject, suite, name, ".raw.json")
    log.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "eval.worker", "--model", str(model), "--benchmark", name, "--out", str(out),
               "--shots", str(benchmark.shots), "--device", device,
               "--batch-size", str(options.batch_size)]  # fmt: skip
    command += ["--limit", str(benchmark.limit)] if benchmark.limit else []
    command += ["--data-root", str(options.data_root)] if options.data_root else []
    command += ["--allow-code"] if options.allow_code else []
    threads = max(1, (os.cpu_count() or 1) // len(options.devices))
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": str(threads),
                   "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def _keep(subject: Subject, suite: Suite, name: str, key: dict[str, Any], code: int) -> None:
    """Makes what a process has written the benchmark's result; a user's error ends everything.

    Raises:
        UserError: the process said what is wrong.
    """
    raw = _file(subject, suite, name, ".raw.json")
    if code == 0 and raw.is_file():
        content = json.loads(raw.read_text(encoding="utf-8"))
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _file(subject, suite, name, ".raw.items.jsonl").replace(_file(subject, suite, name, ".items.jsonl"))
        write_json(_file(subject, suite, name, ".json"), {**content, "key": key, "date": date})
        raw.unlink()
    elif code == 2:
        log = _file(subject, suite, name, ".log")
        said = _last_line(log).removeprefix("error: ").removeprefix(f"{name}: ").rstrip(".")
        raise UserError(f"{name}: {said}", "then run it again", log)


def _bars(console: Console) -> Progress:
    return Progress(TextColumn("  {task.description:28}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
                    TimeElapsedColumn(), console=console)  # fmt: skip


def _percent(log: Path) -> int:
    """How far the newest bar in a log is."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        found = _PERCENT.findall(file.read())
        return int(found[-1]) if found else 0
    return 0


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


@contextlib.contextmanager
def _locked(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Keeps a second evaluation of the same thing out, or lets it wait.

    Raises:
        UserError: there is one, and it is not to be waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{what} is being evaluated already", "wait for that to end", path.parent) from None
        yield


def with_limit(suite: Suite, limit: int) -> Suite:
    """The suite with at most `limit` items of each subtask, under a name of its own: its results replace no others."""
    fewer = {n: b.model_copy(update={"limit": min(limit, b.limit or limit)}) for n, b in suite.benchmarks.items()}
    changed = {"benchmarks": fewer, "name": f"{suite.name}-{limit}"} if fewer != suite.benchmarks else {}
    return suite.model_copy(update=changed)
