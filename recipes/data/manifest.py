"""The manifest of a tokenised folder: what is in it, what made it, and whether it is still so.

`manifest.json` is written last and is what makes a tokenised folder count. `docs/formats.md` lists its keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from recipes.errors import UserError
from recipes.files import FileEntry, checksum, verify_files, write_json

MANIFEST = "manifest.json"
INDEX = ".index"
"""Suffix of a token file's index: little-endian uint64, each document's end in tokens, end of text included."""
INDEX_BYTES = 8
REMAKE = "make the folder again with `smol tokenize`"


@dataclass(frozen=True)
class TokenFile:
    """One .ds file: little-endian token ids, no header; beside it its index."""

    name: str
    """Path relative to the manifest's folder, with forward slashes."""
    tokens: int
    documents: int


@dataclass(frozen=True)
class Manifest:
    """A tokenised folder."""

    folder: Path
    source: str
    tokenizer_sha256: str
    """sha256 of the tokenizer.json."""
    vocab_size: int
    end_of_text_id: int
    """The id that every document ends in, and that occurs nowhere else."""
    token_bytes: int
    """2, or 4 where the vocabulary is above 65,536."""
    tokens: int
    documents: int
    files: tuple[TokenFile, ...]
    config: dict[str, Any]
    """What made the folder."""
    entries: tuple[FileEntry, ...]
    """Size and checksum of every token file and index."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    def of_files(
        cls, folder: Path, names: Sequence[str], *, source: str, tokenizer_sha256: str, vocab_size: int,
        end_of_text_id: int, token_bytes: int, config: dict[str, Any], entries: Iterable[FileEntry] | None = None,
    ) -> Manifest:  # fmt: skip
        """A manifest of .ds files that exist, counted from their sizes and indices; `save` makes it count.

        Args:
            names: the .ds files, relative to `folder`, in the order in which a stream reads them.
            entries: sizes and checksums where they are known already; else the files are read.
        """
        files = tuple(count_file(folder, name, token_bytes) for name in names)
        if entries is None:
            entries = [entry_of(folder, name + suffix) for name in names for suffix in ("", INDEX)]
        return cls(
            folder, source, tokenizer_sha256, vocab_size, end_of_text_id, token_bytes, sum(f.tokens for f in files),
            sum(f.documents for f in files), files, config, tuple(entries),
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads `folder`/manifest.json; `verify` compares it with the files.

        Raises:
            UserError: there is none, or it is not what `save` writes.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return TypeAdapter(cls).validate_python({**content, "folder": folder})
        except (FileNotFoundError, NotADirectoryError):
            raise UserError("this file is missing, so the folder does not count as tokenised", REMAKE, path) from None
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(first["msg"], REMAKE, path, ".".join(map(str, first["loc"]))) from None
        except (ValueError, TypeError) as error:
            raise UserError(f"not a manifest ({error})", REMAKE, path) from None

    def save(self) -> None:
        """Writes manifest.json, atomically: from then on the folder counts."""
        content = asdict(self)
        del content["folder"]
        write_json(self.folder / MANIFEST, content)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the tokens in the .ds files."""
        return np.dtype(f"<u{self.token_bytes}")

    def path(self, file: TokenFile) -> Path:
        """Where a token file is."""
        return self.folder / file.name

    def document_ends(self, file: TokenFile) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """End of each document of a file in tokens, end of text included: (documents,) uint64."""
        return np.fromfile(self.folder / (file.name + INDEX), dtype="<u8")

    def blocks(self, block_tokens: int) -> int:
        """Blocks of `block_tokens` tokens, each with the token that follows it in its file."""
        return sum(max(0, (file.tokens - 1) // block_tokens) for file in self.files)

    def left_out(self, block_tokens: int) -> int:
        """Tokens that are in no block as a target: each file's tail shorter than a block, and its first token."""
        return self.tokens - self.blocks(block_tokens) * block_tokens

    def verify(self, checksums: bool = False) -> None:
        """Compares the folder's files with the manifest: existence, sizes and indices; content with `checksums`.

        Raises:
            UserError: the first file that differs, or counts that contradict each other.
        """
        for what in ("tokens", "documents"):
            total, parts = getattr(self, what), sum(getattr(file, what) for file in self.files)
            if total != parts:
                found = f"{what}: {total:,}, but its files add up to {parts:,}"
                raise UserError(found, REMAKE, self.folder / MANIFEST)
        listed = {entry.name for entry in self.entries}
        if unlisted := [n for file in self.files for n in (file.name, file.name + INDEX) if n not in listed]:
            raise UserError(f"{unlisted[0]} has no size and checksum", REMAKE, self.folder / MANIFEST, "entries")
        verify_files(self.folder, self.entries, checksums=checksums)
        for file in self.files:
            if (counted := count_file(self.folder, file.name, self.token_bytes)) != file:
                found = f"{counted.tokens:,} tokens and {counted.documents:,} documents where the manifest says "
                raise UserError(f"{found}{file.tokens:,} and {file.documents:,}", REMAKE, self.path(file))

    def check_tokenizer(self, sha256: str, name: str) -> None:
        """Raises UserError if the folder was not made with the tokenizer `name`, whose tokenizer.json has `sha256`."""
        if self.tokenizer_sha256 != sha256:
            found = f"made with tokenizer {self.tokenizer_sha256[:12]}…, but the recipe's, {name}, is {sha256[:12]}…"
            fix = "tokenise the source with the recipe's tokenizer, or name the other one in the recipe"
            raise UserError(found, fix, self.folder / MANIFEST, "tokenizer_sha256")


def count_file(folder: Path, name: str, token_bytes: int) -> TokenFile:
    """Counts a .ds file's tokens from its size and its documents from its index.

    Raises:
        UserError: it is missing, has a broken token at its end, or its index ends elsewhere.
    """
    path, index = folder / name, folder / (name + INDEX)
    for part in (path, index):
        if not part.is_file():
            raise UserError("this file is missing", f"restore it, or {REMAKE}", part)
    tokens, torn = divmod(path.stat().st_size, token_bytes)
    documents, torn_index = divmod(index.stat().st_size, INDEX_BYTES)
    if torn or torn_index:
        found = f"its size is no multiple of {token_bytes if torn else INDEX_BYTES} bytes"
        raise UserError(found, f"the file is truncated: {REMAKE}", path if torn else index)
    last = int(np.fromfile(index, dtype="<u8", offset=(documents - 1) * INDEX_BYTES)[0]) if documents else 0
    if last != tokens:
        raise UserError(f"ends at token {last:,}, but its token file has {tokens:,}", REMAKE, index)
    return TokenFile(name, tokens, documents)


def entry_of(folder: Path, name: str) -> FileEntry:
    """Size and checksum of a file."""
    path = folder / name
    return FileEntry(name, path.stat().st_size, checksum(path))


def tokenizer_sha256(path: Path) -> str:
    """sha256 of a tokenizer.json, as hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
