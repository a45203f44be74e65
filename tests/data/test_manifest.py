"""A tokenised folder counts only with a manifest that its files agree with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.manifest import INDEX, MANIFEST, Manifest, TokenFile, tokenizer_sha256
from recipes.errors import UserError

DOCUMENTS = {"a.ds": [40, 60], "b.ds": [7, 1, 20]}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    made = write(tmp_path, DOCUMENTS)
    made.save()
    return made


def write(folder: Path, documents: dict[str, list[int]], token_bytes: int = 2) -> Manifest:
    """Token files with documents of the given lengths, and their manifest, not saved yet."""
    for name, lengths in documents.items():
        np.arange(sum(lengths), dtype=f"<u{token_bytes}").tofile(folder / name)
        np.cumsum(lengths, dtype="<u8").tofile(folder / (name + INDEX))
    return Manifest.of_files(
        folder, list(documents), source="web", tokenizer_sha256="ab" * 32, vocab_size=300, end_of_text_id=0,
        token_bytes=token_bytes, config={"seed": 1},
    )  # fmt: skip


def change(manifest: Manifest, **values: Any) -> None:
    path = manifest.folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_counts_and_returns_unchanged(manifest: Manifest) -> None:
    assert manifest.files == (TokenFile("a.ds", 100, 2), TokenFile("b.ds", 28, 3))
    assert (manifest.tokens, manifest.documents) == (128, 5)
    assert [entry.name for entry in manifest.entries] == ["a.ds", "a.ds.index", "b.ds", "b.ds.index"]
    assert Manifest.load(manifest.folder) == manifest
    manifest.verify(checksums=True)


def test_document_ends(manifest: Manifest) -> None:
    assert manifest.document_ends(manifest.files[1]).tolist() == [7, 8, 28]


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_token_bytes(tmp_path: Path, token_bytes: int) -> None:
    manifest = write(tmp_path, DOCUMENTS, token_bytes)
    assert manifest.tokens == 128
    assert np.fromfile(manifest.path(manifest.files[0]), manifest.dtype).tolist() == list(range(100))


def test_without_manifest_a_folder_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS)
    for folder in (tmp_path, tmp_path / "none", tmp_path / "a.ds"):
        with pytest.raises(UserError, match=r"does not count as tokenised.*smol tokenize"):
            Manifest.load(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "null", "\x00"])
def test_garbled(manifest: Manifest, content: str) -> None:
    (manifest.folder / MANIFEST).write_text(content)
    with pytest.raises(UserError, match="not a manifest"):
        Manifest.load(manifest.folder)


def test_not_utf8(manifest: Manifest) -> None:
    (manifest.folder / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a manifest"):
        Manifest.load(manifest.folder)


def test_unknown_missing_and_mistyped_keys(manifest: Manifest) -> None:
    change(manifest, tokenz=3)
    with pytest.raises(UserError, match="tokenz"):
        Manifest.load(manifest.folder)
    manifest.save()
    change(manifest, tokens="many")
    with pytest.raises(UserError, match="tokens"):
        Manifest.load(manifest.folder)
    manifest.save()
    path = manifest.folder / MANIFEST
    content = json.loads(path.read_text())
    del content["vocab_size"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="vocab_size"):
        Manifest.load(manifest.folder)


@pytest.mark.parametrize("name", ["a.ds", "b.ds.index"])
def test_missing_file(manifest: Manifest, name: str) -> None:
    (manifest.folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: .*missing"):
        manifest.verify()


@pytest.mark.parametrize("name", ["a.ds", "b.ds.index"])
@pytest.mark.parametrize("size", [0, 1, 16])
def test_truncated_file(manifest: Manifest, name: str, size: int) -> None:
    path = manifest.folder / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"{name}: {size} bytes where"):
        manifest.verify()


def test_changed_content_is_found_by_checksums_only(manifest: Manifest) -> None:
    path = manifest.folder / "a.ds"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    manifest.verify(checksums=False)
    with pytest.raises(UserError, match="checksum"):
        manifest.verify(checksums=True)


def test_index_that_ends_elsewhere(manifest: Manifest) -> None:
    np.array([40, 99], dtype="<u8").tofile(manifest.folder / ("a.ds" + INDEX))
    with pytest.raises(UserError, match="ends at token 99, but its token file has 100"):
        manifest.verify()


@pytest.mark.parametrize("name", ["a.ds", "a.ds.index"])
def test_a_torn_file_gets_no_manifest(tmp_path: Path, name: str) -> None:
    write(tmp_path, DOCUMENTS)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"x")
    with pytest.raises(UserError, match=rf"{name}: its size is no multiple"):
        Manifest.of_files(
            tmp_path, ["a.ds"], source="", tokenizer_sha256="", vocab_size=9, end_of_text_id=0, token_bytes=2, config={}
        )


def test_counts_that_contradict_each_other(manifest: Manifest) -> None:
    for what, found in (("tokens", "129, but its files add up to 128"), ("documents", "129, but .* add up to 5")):
        change(manifest, **{what: 129})
        with pytest.raises(UserError, match=found):
            Manifest.load(manifest.folder).verify()
        manifest.save()
    moved = [{"name": "a.ds", "tokens": 99, "documents": 2}, {"name": "b.ds", "tokens": 29, "documents": 3}]
    change(manifest, files=moved)
    with pytest.raises(UserError, match=r"100 tokens .* says 99"):
        Manifest.load(manifest.folder).verify()


def test_every_token_file_has_a_checksum(manifest: Manifest) -> None:
    entries = json.loads((manifest.folder / MANIFEST).read_text())["entries"]
    change(manifest, entries=[entry for entry in entries if entry["name"] != "b.ds"])
    with pytest.raises(UserError, match=r"b\.ds has no size"):
        Manifest.load(manifest.folder).verify()


def test_another_tokenizer(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    manifest.check_tokenizer("ab" * 32, "org/name")
    with pytest.raises(UserError, match=re.escape("the recipe's, org/name, is 44136fa355b3")):
        manifest.check_tokenizer(tokenizer_sha256(path), "org/name")


@given(st.lists(st.integers(0, 60), max_size=5), st.integers(1, 20))
def test_blocks_and_what_is_left_out(tokens: list[int], block: int) -> None:
    files = tuple(TokenFile(f"{n}.ds", count, 1) for n, count in enumerate(tokens))
    manifest = Manifest(Path(), "web", "", 300, 0, 2, sum(tokens), len(tokens), files, {}, ())
    targets = {
        (file.name, position)
        for file in files
        for start in range(0, file.tokens, block)
        if start + block < file.tokens
        for position in range(start + 1, start + block + 1)
    }
    assert manifest.blocks(block) * block == len(targets)
    assert manifest.left_out(block) == sum(tokens) - len(targets)
