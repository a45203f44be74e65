"""`smol tokenize`: documents to token files with datatrove, and the manifest that makes them count.

One rank per input file, so the result never depends on the number of workers:

    <out>/manifest.json              written last
    <out>/<digest>/00003/            rank 3, whole: token files, their indices, rank.json
    <out>/<digest>/00003.*.partial/  rank 3, being written
    <out>/<digest>/logs/             datatrove's, a file per rank, and workers.log

The digest is of everything that the tokens depend on. A rank's folder gets its name when it is complete and checked,
so a rerun, however the last run ended, keeps what is there and does the rest.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datatrove.io import get_datafolder
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.data.manifest import INDEX, Manifest, tokenizer_sha256
from recipes.data.rank import AGAIN, INPUTS, RANK, Job, Rank, run_rank
from recipes.errors import UserError
from recipes.files import PARTIAL, FileEntry, verify_files, write_atomic

FORMAT = 1
"""Part of the digest: to be raised when this module gives other tokens for the same input."""
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
POLL = 0.25
"""Seconds between two looks at what the workers have done."""


def tokenize(
    source: str, data: str, out: Path, tokenizer: Path, end_of_text: str, text: str = "text", workers: int = 1,
    max_tokens_per_file: int | None = None, seed: int = 0, glob: str | None = None, show_progress: bool = True,
) -> Manifest:  # fmt: skip
    """Tokenises a source into `out`; what is complete already is kept.

    Documents without text are skipped; each other one ends in `end_of_text`. Inside a text every special token of the
    tokenizer (end of text, chat marks, file and repository marks) is read as plain characters, never as its id, so a
    document ends where its index says and nowhere else. Documents are shuffled within their input file.

    Args:
        source: its name in the registry; streams are keyed by it.
        data: a folder of parquet or JSONL files (.gz and .zst too), at any depth, or hf://datasets/<id>[/<path>].
            Its files are known by name and size: one changed within its size is not noticed.
        tokenizer: a tokenizer.json.
        text: the column of the text; one with lists is joined by line ends, None left out.
        workers: processes, at least 1; they change the speed only.
        max_tokens_per_file: a token file is ended once it has passed this many tokens; None: one per input file.
        seed: of the shuffling.
        glob: only input files whose path below `data` matches (`*` matches `/` too).
        show_progress: draw a bar on stderr.

    Raises:
        UserError: nothing to read, an input that cannot be read, no such column, an unfit tokenizer, or another
            process at work in `out`.
    """
    root, inputs = list_inputs(data, glob)
    settings = {"end_of_text": end_of_text, "text": text, "seed": seed, "max_tokens_per_file": max_tokens_per_file}
    job = make_job(source, root, inputs, out, tokenizer, **settings)
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(out):
        manifest = _finished(job) or _complete(job, [name for name, _ in inputs], workers, show_progress)
        _remove_leftovers(job)
    return manifest


def make_job(
    source: str, data: str, inputs: Sequence[tuple[str, int]], out: Path, tokenizer: Path, **settings: Any
) -> Job:
    """A job with its digest.

    Args:
        data, inputs: what `list_inputs` gives.
        settings: end_of_text, text, seed and max_tokens_per_file, as `tokenize` takes them.

    Raises:
        UserError: no tokenizer, or one without `end_of_text`.
    """
    vocabulary, end_of_text = load_tokenizer(tokenizer), settings["end_of_text"]
    if (end_of_text_id := vocabulary.token_to_id(end_of_text)) is None:
        specials = ", ".join(token.content for token in vocabulary.get_added_tokens_decoder().values() if token.special)
        raise UserError(f"no token {end_of_text!r}", f"name one of its special tokens: {specials}", tokenizer)
    sha256, vocab_size = tokenizer_sha256(tokenizer), vocabulary.get_vocab_size()
    known = json.dumps([FORMAT, sha256, settings, inputs], sort_keys=True)
    return Job(
        source=source, data=data, out=out.resolve(), digest=hashlib.blake2b(known.encode(), digest_size=8).hexdigest(),
        tokenizer=tokenizer.resolve(), tokenizer_sha256=sha256, vocab_size=vocab_size,
        token_bytes=4 if vocab_size > 1 << 16 else 2, end_of_text_id=end_of_text_id, ranks=len(inputs), **settings,
    )  # fmt: skip


def list_inputs(data: str, glob: str | None = None) -> tuple[str, list[tuple[str, int]]]:
    """Where `data` is, as datatrove takes it, and its input files: path below it and bytes, by path.

    Raises:
        UserError: there is no such folder, it cannot be listed, or no file has a known ending and matches `glob`.
    """
    if "://" not in data and not Path(data).is_dir():
        raise UserError("there is no such folder", "name a folder of parquet or JSONL files, or hf://datasets/ID", data)
    root = data if "://" in data else str(Path(data).resolve())
    try:
        found = get_datafolder(root).find("", detail=True)
    except Exception as error:  # each file system has its own
        fix = "check the name and the network, or download it and name the folder"
        raise UserError(f"{data} cannot be listed ({error})", fix) from None
    inputs = [(name, int(info["size"])) for name, info in sorted(found.items()) if name.endswith(ENDINGS)]
    inputs = [item for item in inputs if glob is None or fnmatch.fnmatch(item[0], glob)]
    if not inputs:
        wanted = ", ".join(f"*{ending}" for ending in ENDINGS) + (f" matching {glob}" if glob else "")
        raise UserError(f"no input among its {len(found)} files", f"it should have {wanted}", data)
    return root, inputs


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another process is tokenising into this folder", "wait for it, or end it", out) from None
        yield


def _finished(job: Job) -> Manifest | None:
    try:
        manifest = Manifest.load(job.out)
        manifest.verify()
    except UserError:
        return None
    same = (manifest.source, manifest.config.get("digest")) == (job.source, job.digest)
    return manifest if same else None


def _complete(job: Job, inputs: list[str], workers: int, show_progress: bool) -> Manifest:
    """Does the ranks that are missing or damaged, then writes the manifest."""
    job.logs.mkdir(parents=True, exist_ok=True)
    write_atomic(job.folder / INPUTS, "".join(f"{name}\n" for name in inputs))
    ranks = {number: rank for number in range(job.ranks) if (rank := _load_rank(job, number))}
    missing = [number for number in range(job.ranks) if number not in ranks]
    for number in missing:
        shutil.rmtree(job.rank(number), ignore_errors=True)
    if missing:
        _run(job, missing, ranks, min(workers, len(missing)), _Bar(job, ranks, show_progress))
    manifest = _manifest(job, [ranks[number] for number in range(job.ranks)])
    manifest.verify()
    manifest.save()
    return manifest


def _load_rank(job: Job, number: int) -> Rank | None:
    """A rank that is there and whole."""
    folder = job.rank(number)
    try:
        content = json.loads((folder / RANK).read_text(encoding="utf-8"))
        entries = tuple(FileEntry(**entry) for entry in content["entries"])
        verify_files(folder, entries, checksums=False)
    except (OSError, ValueError):
        return None
    return Rank(content["tokens"], content["documents"], tuple(content["columns"]), entries)


def _manifest(job: Job, ranks: list[Rank]) -> Manifest:
    if not sum(rank.documents for rank in ranks):
        columns = ", ".join(sorted({column for rank in ranks for column in rank.columns}))
        fix = f"name the column of the text: {columns or '(the files are empty)'}"
        raise UserError(f"no document has text in the column {job.text!r}", fix, job.data)
    entries = [
        FileEntry(f"{job.digest}/{number:05d}/{entry.name}", entry.bytes, entry.xxh3_128)
        for number, rank in enumerate(ranks)
        for entry in rank.entries
    ]
    made_by = {name: importlib.metadata.version(name) for name in ("datatrove", "tokenizers")}
    of_job = ("digest", "data", "end_of_text", "text", "seed", "max_tokens_per_file")
    return Manifest.of_files(
        job.out, [entry.name for entry in entries if not entry.name.endswith(INDEX)], source=job.source,
        tokenizer_sha256=job.tokenizer_sha256, vocab_size=job.vocab_size, end_of_text_id=job.end_of_text_id,
        token_bytes=job.token_bytes, config={**{name: getattr(job, name) for name in of_job}, **made_by},
        entries=entries,
    )  # fmt: skip


def _remove_leftovers(job: Job) -> None:
    """Removes what other configurations and killed processes left; only what this project names so."""
    others = [path for path in job.out.iterdir() if re.fullmatch("[0-9a-f]{16}", path.name) and path != job.folder]
    for path in [*others, *job.out.glob(f"*{PARTIAL}"), *job.folder.glob(f"*{PARTIAL}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _run(job: Job, missing: list[int], ranks: dict[int, Rank], workers: int, bar: _Bar) -> None:
    """Does `missing` ranks in worker processes and adds them to `ranks`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run_rank.__module__])
    ended, main_is_alive = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job.logs / "workers.log", ended))
    try:
        with bar.progress:
            waiting = {pool.submit(run_rank, job, number): number for number in missing}
            while waiting:
                for future in wait(waiting, POLL, FIRST_EXCEPTION).done:
                    ranks[waiting.pop(future)] = future.result()
                bar.show()
        pool.shutdown()
    except BrokenProcessPool:
        fix = f"look there; if memory ran out, take fewer workers; then {AGAIN}"
        raise UserError("a worker process ended", fix, job.logs / "workers.log") from None
    except OSError as error:
        raise UserError(f"cannot be written ({error})", f"make room; then {AGAIN}", job.out) from error
    finally:
        # Closing ends the workers, at work or not: what they have not finished counts for nothing.
        main_is_alive.close()
        pool.shutdown(cancel_futures=True)


def _start_worker(log: Path, ended: Connection) -> None:
    """Makes this process a worker: one core, quiet, and gone as soon as the main process is."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)

    def watch() -> None:
        ended.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Bar:
    """Progress by looking at the ranks' folders: files, documents, tokens, tokens a second."""

    def __init__(self, job: Job, ranks: dict[int, Rank], shown: bool) -> None:
        self.job, self.ranks, self.before = job, ranks, sum(rank.tokens for rank in ranks.values())
        fields = "{task.completed}/{task.total} files · {task.fields[counts]}"
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(20), TextColumn(fields), console=Console(stderr=True),
            disable=not shown,
        )  # fmt: skip
        self.task = self.progress.add_task(job.source, total=job.ranks, completed=len(ranks), counts="")

    def show(self) -> None:
        """Draws the present state."""
        tokens = sum(rank.tokens for rank in self.ranks.values())
        for path in self.job.folder.glob(f"*{PARTIAL}/*_unshuffled.ds"):
            with suppress(FileNotFoundError):
                tokens += path.stat().st_size // self.job.token_bytes
        documents = sum(rank.documents for rank in self.ranks.values())
        rate = (tokens - self.before) / (self.progress.tasks[0].elapsed or 1)
        counts = f"{documents:,} documents · {tokens:,} tokens · {rate:,.0f} tokens/s"
        self.progress.update(self.task, completed=len(self.ranks), counts=counts)


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises UserError if `path` is no tokenizer.json."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise UserError(f"cannot be read as a tokenizer ({error})", "name a tokenizer.json", path) from None


def train_tokenizer(texts: Iterable[str], vocab_size: int, end_of_text: str, path: Path) -> None:
    """Trains a byte-level BPE tokenizer, digits split as SmolLM2's does, and writes tokenizer.json to `path`.

    The same texts in the same order give the same bytes. Ids 0 to 2 are `end_of_text`, <|im_start|> and <|im_end|>.

    Raises:
        UserError: the texts do not hold enough for `vocab_size` entries.
    """
    tokenizer = Tokenizer(models.BPE())
    digits, bytewise = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[end_of_text, "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise UserError(f"these texts give {size:,} entries, not {vocab_size:,}", "give more text, or ask for fewer")
    write_atomic(path, tokenizer.to_str(pretty=True))


def resolve_tokenizer(name: str, cache: Path | None = None) -> Path:
    """The tokenizer.json of a recipe's tokenizer: a file, a folder that has one, or a Hub id, fetched into `cache`.

    Raises:
        UserError: there is none by that name, or the Hub cannot be reached.
    """
    path = Path(name)
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError("no tokenizer.json in this folder", "name a folder that has one, or a Hub id", path)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json", cache_dir=cache))
    except (OSError, ValueError) as error:
        fix = "check the name, the network and `hf auth login`, or name a local tokenizer.json"
        raise UserError(f"neither a local path nor to be had from the Hub ({error})", fix, name) from None
