from __future__ import annotations

import os
from pathlib import Path

import pytest

from recipes.errors import UserError
from recipes.files import append_line, keep_lines, list_files, read_lines, verify_files, write_atomic


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_replaced_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    with path.open() as reader:
        write_atomic(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_verify_names_the_first_bad_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    entries = list_files(tmp_path)
    verify_files(tmp_path, entries)
    (tmp_path / "b").write_bytes(b"twO")
    verify_files(tmp_path, entries, checksums=False)
    with pytest.raises(UserError, match=r"/b: checksum .* corrupted"):
        verify_files(tmp_path, entries)
    (tmp_path / "b").write_bytes(b"tw")
    with pytest.raises(UserError, match=r"/b: 2 bytes where the manifest says 3"):
        verify_files(tmp_path, entries, checksums=False)
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match=r"/b: .*missing"):
        verify_files(tmp_path, entries, checksums=False)


def test_a_torn_last_line_is_left_out_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    keep_lines(path, lambda line: line["step"] <= 2)
    append_line(path, {"step": 3}, sync=True)
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
