"""One rank of `smol tokenize`: one input file to token files, with datatrove, in a worker process."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.tokens import DocumentTokenizer
from pyarrow.parquet import ParquetFile
from tokenizers import Tokenizer

from recipes.data.manifest import INDEX, count_file, entry_of
from recipes.errors import UserError
from recipes.files import PARTIAL, FileEntry, sync_folder, write_json

RANK = "rank.json"
INPUTS = "inputs.txt"
METADATA = ".metadata"
"""Suffix of datatrove's own note on a token file: tokenizer and token bytes, tokens, tokens readably."""
AGAIN = "run the same command again: it keeps what is complete"


@dataclass(frozen=True)
class Job:
    """A source to tokenise; a rank is one input file, by its position in inputs.txt."""

    source: str
    data: str
    out: Path
    digest: str
    tokenizer: Path
    tokenizer_sha256: str
    vocab_size: int
    token_bytes: int
    end_of_text: str
    end_of_text_id: int
    text: str
    seed: int
    max_tokens_per_file: int | None
    ranks: int

    @property
    def folder(self) -> Path:
        """Where the ranks' folders are."""
        return self.out / self.digest

    @property
    def logs(self) -> Path:
        """Where datatrove's logs go."""
        return self.folder / "logs"

    def rank(self, number: int) -> Path:
        """A rank's folder."""
        return self.folder / f"{number:05d}"


@dataclass(frozen=True)
class Rank:
    """rank.json: what a complete rank holds."""

    tokens: int
    documents: int
    columns: tuple[str, ...]
    """Columns of the input file."""
    entries: tuple[FileEntry, ...]
    """Token files and indices, by name inside the rank's folder."""


def run_rank(job: Job, number: int) -> Rank:
    """Tokenises one input file, in this process; its folder appears when it is complete and checked.

    Raises:
        UserError: the file cannot be read or lacks the column, or the token files contradict what was written.
    """
    partial = job.rank(number).with_name(f"{number:05d}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    reader, writer = TextReader(job), TokenWriter(job, number, partial)
    RankExecutor(job, number, [reader, writer]).run()
    rank = _check_rank(job, partial, reader, writer)
    write_json(partial / RANK, asdict(rank))
    partial.rename(job.rank(number))
    sync_folder(job.folder)
    return rank


def _check_rank(job: Job, folder: Path, reader: TextReader, writer: TokenWriter) -> Rank:
    for path in folder.glob("*.ds"):
        if not path.stat().st_size:  # no documents, or the last one was where a file ends
            for suffix in ("", INDEX, METADATA):
                path.with_name(path.name + suffix).unlink()
    files = [count_file(folder, path.name, job.token_bytes) for path in sorted(folder.glob("*.ds"))]
    in_files = sum(file.tokens for file in files), sum(file.documents for file in files)
    written = writer.stats["tokens"].total, writer.stats["tokens"].n
    if in_files != written:
        raise UserError(f"{in_files} tokens and documents in the files, {written} written", AGAIN, folder)
    for file in files:
        _, count, _ = (folder / (file.name + METADATA)).read_text().split("\n")
        if int(count) != file.tokens:
            raise UserError(f"{count} tokens by its metadata, {file.tokens} in the file", AGAIN, folder / file.name)
        _check_ends(job, folder / file.name)
    entries = tuple(entry_of(folder, file.name + suffix) for file in files for suffix in ("", INDEX))
    return Rank(*in_files, tuple(sorted(reader.columns)), entries)


def _check_ends(job: Job, path: Path) -> None:
    """Documents end where the index says, and end of text stands nowhere else; then syncs the file."""
    tokens = np.memmap(path, dtype=f"<u{job.token_bytes}", mode="r")
    ends = np.fromfile(path.with_name(path.name + INDEX), dtype="<u8")
    marks = sum(int(np.count_nonzero(part == job.end_of_text_id)) for part in _parts(tokens))
    if marks != len(ends) or not (tokens[ends - 1] == job.end_of_text_id).all():
        found = f"{job.end_of_text!r} occurs {marks:,} times in {len(ends):,} documents"
        raise UserError(found, "make it a special token of the tokenizer", job.tokenizer)
    for written in (path, path.with_name(path.name + INDEX)):
        with open(written, "rb") as file:
            os.fsync(file.fileno())


def _parts(tokens: np.ndarray[Any, Any], size: int = 1 << 24) -> Iterator[np.ndarray[Any, Any]]:
    return (tokens[start : start + size] for start in range(0, len(tokens), size))


class RankExecutor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's executor for one rank in this process; what is complete is not its business.

    Its own pool would wait for ever for a worker that was killed, and its completion marks know neither parameters
    nor whether the files are whole.
    """

    def __init__(self, job: Job, number: int, pipeline: list[Any]) -> None:
        super().__init__(
            pipeline, tasks=job.ranks, workers=1, logging_dir=str(job.logs), skip_completed=False, local_tasks=1,
            local_rank_offset=number,
        )  # fmt: skip

    def run(self) -> None:
        """Runs the rank."""
        self._run_for_rank(self.local_rank_offset)


def _lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    if name.endswith(".gz"):
        yield from gzip.GzipFile(fileobj=file)
    elif name.endswith(".zst"):
        rest = b""
        for part in _unpack_zstd(file):
            *lines, rest = (rest + part).split(b"\n")
            yield from lines
        yield from [rest] if rest else []
    else:
        yield from file


def _unpack_zstd(file: IO[bytes]) -> Iterator[bytes]:
    """All frames of a file; zstandard's own reader takes a file that ends inside a frame for a shorter one."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    while packed := file.read(1 << 20):
        while packed:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(packed)
            packed = frame.unused_data
    if not frame.eof:
        raise EOFError("it ends in the middle")


class TextReader(BaseDiskReader):  # type: ignore[misc]
    """Reads one column, and refuses what datatrove's readers pass over with a warning: no such column, a torn line."""

    name = "Text"

    def __init__(self, job: Job) -> None:
        super().__init__(job.data, paths_file=str(job.folder / INPUTS), text_key=job.text)
        self.columns: set[str] = set()

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of an input file that have text."""
        rows = self._parquet if filepath.endswith(".parquet") else self._json_lines
        place = self.data_folder.resolve_paths(filepath)
        try:
            with self.data_folder.open(filepath, "rb") as file:
                for number, value in enumerate(rows(file, filepath)):
                    if (text := self._text(value)) and not text.isspace():
                        yield Document(text, f"{filepath}/{number}")
            if self.columns and self.text_key not in self.columns:
                fix = f"name the column of the text: {', '.join(sorted(self.columns))}"
                raise UserError(f"no column {self.text_key!r}", fix)
        except UserError as error:
            raise UserError(error.found, error.fix, place, error.where) from None
        except Exception as error:  # each format and compression has its own
            raise UserError(f"cannot be read ({error})", "the file is damaged: get it again", place) from error

    def _parquet(self, file: IO[bytes], _: str) -> Iterator[Any]:
        parquet = ParquetFile(file)
        self.columns.update(parquet.schema_arrow.names)
        if self.text_key in self.columns:
            for batch in parquet.iter_batches(batch_size=1000, columns=[self.text_key]):
                yield from batch.column(0).to_pylist()

    def _json_lines(self, file: IO[bytes], name: str) -> Iterator[Any]:
        for number, line in enumerate(_lines(file, name), 1):
            try:
                row = json.loads(line)
                self.columns.update(row.keys())
            except (ValueError, AttributeError):
                raise UserError("not a JSON object", "repair the line or remove it", where=f"line {number}") from None
            yield row.get(self.text_key)

    def _text(self, value: Any) -> str:
        if isinstance(value, list):
            value = "\n".join(part for part in value if part is not None)
        if not isinstance(value, str | None):
            found = f"the column {self.text_key!r} holds {type(value).__name__}, not text"
            raise UserError(found, f"name the column of the text: {', '.join(sorted(self.columns))}")
        return re.sub("[\ud800-\udfff]", "\ufffd", value or "")


class TokenWriter(DocumentTokenizer):  # type: ignore[misc]
    """Writes one rank's token files; special tokens inside a text are plain characters to it."""

    def __init__(self, job: Job, number: int, folder: Path) -> None:
        super().__init__(
            str(folder), str(job.tokenizer), eos_token=job.end_of_text, batch_size=1000,
            max_tokens_per_file=job.max_tokens_per_file,
        )  # fmt: skip
        self.rand = np.random.default_rng([job.seed, number])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """datatrove's, which adds the end of text, without what would change a text or cut it."""
        tokenizer: Tokenizer = super().tokenizer
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
