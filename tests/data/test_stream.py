"""A source's stream: every block once an epoch, in an order of its own, and every token a target once."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.manifest import Manifest
from recipes.data.stream import FEW, OPEN_FILES, Permutation, SourceStream, epoch_key
from recipes.errors import UserError

BLOCK = 16
SIZES = (16, 17, 100, 5, 64, 65, 33)
"""Tokens per file: 0, 1, 6, 0, 3, 4 and 2 blocks of 16."""
BLOCKS = 16
EPOCH = BLOCKS * BLOCK


def write_tokens(folder: Path, sizes: Iterable[int] = SIZES, *, source: str = "web", token_bytes: int = 2,
                 sha256: str = "0" * 64) -> Manifest:  # fmt: skip
    """A tokenised folder whose token ids count on through all files, so that an id tells its file and its place."""
    folder.mkdir(parents=True)
    first, names = 0, []
    for size in sizes:
        names.append(f"{len(names):05}.ds")
        np.arange(first, first + size, dtype=f"<u{token_bytes}").tofile(folder / names[-1])
        np.array([size], dtype="<u8").tofile(folder / f"{names[-1]}.index")
        first += size
    return Manifest.of_files(
        folder, names, source=source, tokenizer_sha256=sha256, vocab_size=1 << 8 * token_bytes, end_of_text_id=0,
        token_bytes=token_bytes, config={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Seven files with sixteen blocks."""
    return write_tokens(tmp_path_factory.mktemp("stream") / "web")


@pytest.fixture(scope="module")
def stream(manifest: Manifest) -> SourceStream:
    """The same, opened."""
    return SourceStream(manifest, 42, BLOCK)


def block_starts(sizes: Iterable[int] = SIZES) -> list[int]:
    """The first token id of every block."""
    edges = np.cumsum([0, *sizes]).tolist()
    return [b for a, e in pairwise(edges) for b in range(a, e - BLOCK, BLOCK)]


KEYS = st.integers(0, (1 << 64) - 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), KEYS)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    permuted = Permutation(size, key).at(np.arange(size))
    assert permuted.dtype == np.int64
    assert np.array_equal(np.sort(permuted), np.arange(size))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 1 << 62), KEYS, st.data())
def test_permutation_of_ints_and_arrays_agree(size: int, key: int, data: st.DataObject) -> None:
    elements = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=50))
    permutation = Permutation(size, key)
    one_by_one = [permutation.at(i) for i in elements]
    assert permutation.at(np.array(elements, dtype=np.int64)).tolist() == one_by_one
    assert len(set(one_by_one)) == len(elements)
    assert all(type(place) is int and 0 <= place < size for place in one_by_one)


def test_permutation_puts_every_element_everywhere() -> None:
    """Chi-square of the places of five elements over 3,000 keys; 16 degrees of freedom, one in a million above 54."""
    places = np.zeros((5, 5))
    for epoch in range(3000):
        places[np.arange(5), Permutation(5, epoch_key(0, "web", epoch)).at(np.arange(5))] += 1
    assert ((places - 600) ** 2 / 600).sum() < 54


def test_permutation_tears_neighbours_apart() -> None:
    size = 10_000
    permuted = Permutation(size, 7).at(np.arange(size))
    assert np.count_nonzero(np.abs(np.diff(permuted)) == 1) < 12  # 2 expected
    assert np.count_nonzero(permuted == np.arange(size)) < 10  # 1 expected


def test_permutation_never_changes() -> None:
    """A run may outlive a release of this code; another order would break its data plan."""
    assert epoch_key(42, "fineweb-edu", 3) == 0xE0F689B292A51752
    assert [Permutation(1000, 42).at(i) for i in range(8)] == [754, 544, 798, 404, 793, 232, 831, 880]


@pytest.mark.parametrize("i", [-1, 10, np.array([0, -1]), np.array([10])])
def test_permutation_refuses_what_is_outside(i: int | np.ndarray) -> None:
    with pytest.raises(IndexError, match=r"outside \[0, 10\)"):
        Permutation(10, 0).at(i)


@pytest.mark.parametrize("size", [0, -1, (1 << 62) + 1])
def test_permutation_refuses_sizes(size: int) -> None:
    with pytest.raises(UserError, match="elements"):
        Permutation(size, 0)


def test_an_epoch_has_every_block_once(stream: SourceStream, manifest: Manifest) -> None:
    assert (stream.blocks, stream.epoch_tokens) == (manifest.blocks(BLOCK), EPOCH)
    for epoch in (0, 1, 7, 10**9):
        blocks = stream.read(epoch * EPOCH, EPOCH).reshape(BLOCKS, BLOCK)
        assert np.array_equal(blocks, blocks[:, :1] + np.arange(BLOCK))
        assert sorted(blocks[:, 0].tolist()) == block_starts()


def test_order_differs_by_epoch_seed_and_source(tmp_path: Path, manifest: Manifest) -> None:
    streams = [SourceStream(manifest, seed, BLOCK) for seed in (42, 43)]
    streams.append(SourceStream(write_tokens(tmp_path / "code", source="code"), 42, BLOCK))
    orders = {s.read(e * EPOCH, EPOCH).tobytes() for s in streams for e in range(5)}
    assert len(orders) == 15
    assert SourceStream(manifest, 42, BLOCK).read(0, EPOCH).tobytes() in orders


@settings(max_examples=200, deadline=None)
@given(offset=st.integers(0, 4 * EPOCH), first=st.integers(0, 2 * EPOCH), second=st.integers(0, 2 * EPOCH))
def test_read_is_additive(stream: SourceStream, offset: int, first: int, second: int) -> None:
    parts = np.concatenate([stream.read(offset, first), stream.read(offset + first, second)])
    assert np.array_equal(parts, stream.read(offset, first + second))


@pytest.mark.parametrize("length", [1, 4, 8, BLOCK])
def test_every_token_is_a_target_once_an_epoch(stream: SourceStream, manifest: Manifest, length: int) -> None:
    samples = stream.samples(np.arange(EPOCH, 2 * EPOCH, length), length)
    targets = samples[:, 1:].ravel()
    expected = [token for start in block_starts() for token in range(start + 1, start + BLOCK + 1)]
    assert sorted(targets.tolist()) == expected
    assert manifest.tokens - len(targets) == manifest.left_out(BLOCK)


def test_the_last_label_of_a_block_follows_it_in_its_file(stream: SourceStream) -> None:
    for offset in range(0, EPOCH, BLOCK):
        sample = stream.sample(offset, BLOCK)
        assert np.array_equal(sample, sample[0] + np.arange(BLOCK + 1))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**9), max_size=2 * FEW), st.sampled_from([4, 8, BLOCK]))
def test_a_sample_is_the_stream_and_the_next_token(stream: SourceStream, numbers: list[int], length: int) -> None:
    offsets = np.array(numbers, dtype=np.int64) * length
    samples = stream.samples(offsets, length)
    assert samples.shape == (len(numbers), length + 1)
    for offset, row in zip(offsets.tolist(), samples, strict=True):
        assert np.array_equal(row[:-1], stream.read(offset, length))
        assert np.array_equal(row, stream.sample(offset, length))


def test_a_sample_may_be_changed_without_the_file(stream: SourceStream) -> None:
    before = stream.sample(0, BLOCK)
    stream.sample(0, BLOCK)[:] = 0
    assert np.array_equal(stream.sample(0, BLOCK), before)


def test_tokens_of_four_bytes(tmp_path: Path) -> None:
    wide = SourceStream(write_tokens(tmp_path / "web", (70_000, 70_000), token_bytes=4), 0, BLOCK)
    tokens = wide.read(0, wide.epoch_tokens)
    assert (tokens.dtype, wide.sample(0, BLOCK).dtype) == (np.dtype("<u4"), np.dtype("<u4"))
    assert sorted(tokens.tolist()) == [*range(69_984), *range(70_000, 139_984)]


@pytest.mark.parametrize("count", [1, FEW])
def test_a_sample_stays_in_its_block(stream: SourceStream, count: int) -> None:
    with pytest.raises(UserError, match="12 tokens leaves its block of 16"):
        stream.sample(12, 12)
    with pytest.raises(UserError, match="12 tokens leaves its block of 16"):
        stream.samples(np.array([0] * (count - 1) + [12]), 12)


def test_nothing_is_before_the_stream(stream: SourceStream) -> None:
    for read in (lambda: stream.read(-1, 4), lambda: stream.read(4, -1), lambda: stream.sample(-16, 16)):
        with pytest.raises(IndexError):
            read()
    with pytest.raises(IndexError):
        stream.samples(np.array([0, -16]), 16)


def test_a_source_below_one_block_is_refused(tmp_path: Path) -> None:
    small = write_tokens(tmp_path / "web", (16, 10))
    with pytest.raises(UserError, match="'web' has 26 tokens, not one block of 16"):
        SourceStream(small, 0, BLOCK)


def test_files_are_opened_when_needed_and_must_be_whole(tmp_path: Path) -> None:
    source = write_tokens(tmp_path / "web", (40, 40))
    stream = SourceStream(source, 0, BLOCK)
    assert len(stream.read(0, 0)) == 0
    for damage in (lambda path: os.truncate(path, 78), lambda path: os.truncate(path, 0), Path.unlink):
        damage(tmp_path / "web" / "00001.ds")
        with pytest.raises(UserError, match=r"00001\.ds: .* where the manifest says 40"):
            SourceStream(source, 0, BLOCK).read(0, stream.epoch_tokens)


def test_many_files_need_few_descriptors(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts descriptors in /proc")
    stream = SourceStream(write_tokens(tmp_path / "web", [BLOCK + 1] * 3 * OPEN_FILES), 0, BLOCK)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert len(np.unique(stream.read(0, stream.epoch_tokens))) == stream.epoch_tokens
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES  # noqa: PTH208


def test_a_stream_travels_to_another_process_without_its_tokens(stream: SourceStream) -> None:
    unread = pickle.dumps(SourceStream(stream.manifest, stream.seed, BLOCK))
    stream.read(0, EPOCH)
    assert pickle.dumps(stream) == unread
    assert np.array_equal(pickle.loads(unread).read(EPOCH, EPOCH), stream.read(EPOCH, EPOCH))
