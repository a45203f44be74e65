"""A source as an endless stream of tokens: epoch after epoch of its blocks, each epoch in an order of its own."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import lru_cache, partial
from hashlib import blake2b, shake_128
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from recipes.data.interleave import IntArray
from recipes.errors import UserError

if TYPE_CHECKING:
    from recipes.data.manifest import Manifest

Tokens = np.ndarray[Any, np.dtype[Any]]
"""Token ids in the type of the token files: little-endian uint16 or uint32."""
Words = np.ndarray[Any, np.dtype[np.uint64]]

ROUNDS = 12
"""Feistel rounds, an even number. Four make a pseudo-random permutation of a large set (Luby and Rackoff, 1988); small
sets need more: over 20,000 keys the 120 orders of five elements had a chi-square per degree of freedom of 16 with 6
rounds, 4.7 with 8 and 1.2 with 12, where 1 is even."""
FEW = 24
"""Fewer elements or samples than this are faster one by one than with array operations."""
MAX_SIZE = 1 << 62
OPEN_FILES = 32
"""Token files that one source keeps mapped: every map holds a file descriptor, often limited to 1,024 a process."""

_WORD = (1 << 64) - 1
# The multipliers of SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# 2014), between which the upper half is folded into the lower.
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Permutation:
    """A pseudo-random permutation of [0, size), chosen by a key: no table, any element at once.

    A Feistel network over pairs (i div b, i mod b) with a = ⌈√size⌉ and b = ⌈size/a⌉ adds to one half, in turns, a
    hash of the other half. The a·b pairs, fewer than twice the size, are walked along their cycle until the result is
    inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, size: int, key: int) -> None:
        """`key` counts modulo 2^64.

        Raises:
            UserError: a size outside [1, 2^62].
        """
        if not 1 <= size <= MAX_SIZE:
            raise UserError(f"a permutation of {size:,} elements", "give a size from 1 to 2^62")
        self.size = size
        self._high = math.isqrt(size - 1) + 1
        self._low = -(-size // self._high)
        expanded = shake_128((key & _WORD).to_bytes(8, "little")).digest(8 * ROUNDS)
        self._keys = struct.unpack(f"<{ROUNDS}Q", expanded)

    @overload
    def at(self, i: int) -> int: ...
    @overload
    def at(self, i: IntArray) -> IntArray: ...
    def at(self, i: int | IntArray) -> int | IntArray:
        """Where the permutation takes i: an int for an int, an int64 array of i's shape for an array.

        Raises:
            IndexError: an i outside [0, size).
        """
        if isinstance(i, np.ndarray):
            return self._at_array(i)
        if not 0 <= i < self.size:
            raise IndexError(f"element {i} is outside [0, {self.size})")
        place = self._pass(int(i))
        while place >= self.size:
            place = self._pass(place)
        return place

    def _at_array(self, i: IntArray) -> IntArray:
        if i.size and (i.min() < 0 or i.max() >= self.size):
            raise IndexError(f"an element is outside [0, {self.size})")
        if i.size < FEW:
            return np.array([self.at(element) for element in i.ravel().tolist()], dtype=np.int64).reshape(i.shape)
        place = self._pass_array(i.astype(np.uint64))
        while (outside := place >= self.size).any():
            place[outside] = self._pass_array(place[outside])
        return place.astype(np.int64)

    def _pass(self, i: int) -> int:
        """All rounds once. The hash's upper half is scaled to the half that it is added to; then the halves swap."""
        half, other = divmod(i, self._low)
        size, other_size = self._high, self._low
        for key in self._keys:
            word = (other ^ key) * _FIRST & _WORD
            word = (word ^ word >> 32) * _SECOND & _WORD
            half, other = other, (half + ((word >> 32) * size >> 32)) % size
            size, other_size = other_size, size
        return half * self._low + other

    def _pass_array(self, i: Words) -> Words:
        size, other_size = np.uint64(self._high), np.uint64(self._low)
        half, other = np.divmod(i, other_size)
        for key in self._keys:
            word = (other ^ np.uint64(key)) * np.uint64(_FIRST)
            word = (word ^ word >> np.uint64(32)) * np.uint64(_SECOND)
            total = half + ((word >> np.uint64(32)) * size >> np.uint64(32))
            # Below twice the size. Less the size it is right, or wraps round zero to a huge number.
            half, other = other, np.minimum(total, total - size)
            size, other_size = other_size, size
        return half * np.uint64(self._low) + other


def epoch_key(seed: int, source: str, epoch: int) -> int:
    """The key of a source's order of blocks in an epoch: 64 bits of BLAKE2b over all three."""
    text = f"{seed}\n{source}\n{epoch}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class SourceStream:
    """A tokenised source read for ever: each epoch has every block once, in a pseudo-random order.

    A file of t tokens gives ⌊(t − 1)/block_tokens⌋ blocks, from its beginning; a block is read in order. Token files
    are memory-mapped when first needed; nothing else is kept.
    """

    def __init__(self, manifest: Manifest, seed: int, block_tokens: int) -> None:
        """Opens a source; no token file is touched.

        Args:
            seed: the recipe's; with the source's name and the epoch it fixes the order of the blocks.
            block_tokens: tokens per block, a multiple of every sequence length to be read.

        Raises:
            UserError: the source is too small for a single block.
        """
        self.manifest, self.seed, self.block_tokens = manifest, seed, block_tokens
        blocks = [max(0, (file.tokens - 1) // block_tokens) for file in manifest.files]
        self._first_block = np.cumsum([0, *blocks], dtype=np.int64)
        self.blocks = int(self._first_block[-1])
        """Blocks in an epoch."""
        if self.blocks == 0:
            found = f"the source '{manifest.source}' has {manifest.tokens:,} tokens, not one block of {block_tokens:,}"
            fix = f"give it a file of at least {block_tokens + 1:,} tokens, or leave it out of the mixture"
            raise UserError(found, fix, manifest.folder)
        self.epoch_tokens = self.blocks * block_tokens
        """Tokens after which an epoch ends."""
        self._file: Callable[[int], Tokens] = lru_cache(OPEN_FILES)(partial(_map_file, manifest))
        self._order: Callable[[int], Permutation] = lru_cache(2)(partial(_order, self.blocks, seed, manifest.source))
        self._latest = 0, self._find(0)  # The samples of a block are mostly wanted one after another.

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles what it was made from, not the maps: another process opens the files itself."""
        return SourceStream, (self.manifest, self.seed, self.block_tokens)

    def read(self, offset: int, length: int) -> Tokens:
        """The stream's tokens [offset, offset + length), across blocks and epochs: (length,) in the files' type.

        Raises:
            IndexError: a negative offset or length.
        """
        if offset < 0 or length < 0:
            raise IndexError(f"tokens from {offset}, {length} of them: neither may be negative")
        end = offset + length
        next_block = (offset // self.block_tokens + 1) * self.block_tokens
        begins = np.array([offset, *range(next_block, end, self.block_tokens)], dtype=np.int64)
        lengths = np.diff(begins, append=end).tolist()
        files, starts = self.locate(begins)
        out = np.empty(length, dtype=self.manifest.dtype)
        done = 0
        for file, start, count in zip(files.tolist(), starts.tolist(), lengths, strict=True):
            out[done : done + count] = self._file(file)[start : start + count]
            done += count
        return out

    def sample(self, offset: int, sequence_length: int) -> Tokens:
        """One training sample: (sequence_length + 1,) tokens in the files' type.

        The stream's tokens [offset, offset + sequence_length), which must lie inside one block, and the token that
        follows them in their file.

        Raises:
            UserError: the sample would leave its block.
            IndexError: a negative offset.
        """
        self._check(offset, offset % self.block_tokens, sequence_length)
        file, start = self.locate(offset)
        return self._file(file)[start : start + sequence_length + 1].copy()

    def samples(self, offsets: IntArray, sequence_length: int) -> Tokens:
        """`sample` of each of k offsets: (k, sequence_length + 1) in the files' type."""
        if offsets.size:
            self._check(offsets.min(), (offsets % self.block_tokens).max(), sequence_length)
        files, starts = self.locate(offsets)
        out = np.empty((len(offsets), sequence_length + 1), dtype=self.manifest.dtype)
        for row, file, start in zip(out, files.tolist(), starts.tolist(), strict=True):
            row[:] = self._file(file)[start : start + sequence_length + 1]
        return out

    @overload
    def locate(self, offset: int) -> tuple[int, int]: ...
    @overload
    def locate(self, offset: IntArray) -> tuple[IntArray, IntArray]: ...
    def locate(self, offset: int | IntArray) -> tuple[int, int] | tuple[IntArray, IntArray]:
        """Where a token of the stream is: the number of its file in the manifest, and its place in that file.

        Two ints for an int, two (k,) int64 arrays for an array of k offsets. Offsets are at least 0.
        """
        if isinstance(offset, np.ndarray):
            return self._locate_array(offset)
        number, position = divmod(int(offset), self.block_tokens)
        latest, (file, start) = self._latest
        if latest != number:
            file, start = self._find(number)
            self._latest = number, (file, start)
        return file, start + position

    def _find(self, number: int) -> tuple[int, int]:
        """File and first token of a block, counted from the stream's beginning."""
        epoch, within = divmod(number, self.blocks)
        block = self._order(epoch).at(within)
        file = int(self._first_block.searchsorted(block, side="right")) - 1
        return file, (block - int(self._first_block[file])) * self.block_tokens

    def _locate_array(self, offsets: IntArray) -> tuple[IntArray, IntArray]:
        epochs, within = np.divmod(offsets, self.epoch_tokens)
        numbers, position = np.divmod(within, self.block_tokens)
        blocks = np.empty_like(numbers)
        by_epoch = np.argsort(epochs, kind="stable")
        for same in np.split(by_epoch, np.flatnonzero(np.diff(epochs[by_epoch])) + 1):
            if same.size:
                blocks[same] = self._order(int(epochs[same[0]])).at(numbers[same])
        files = self._first_block.searchsorted(blocks, side="right") - 1
        return files, (blocks - self._first_block[files]) * self.block_tokens + position

    def _check(self, lowest: int, position: int, sequence_length: int) -> None:
        if lowest < 0:
            raise IndexError(f"the stream has no token {lowest}")
        if position + sequence_length > self.block_tokens:
            found = f"a sample of {sequence_length:,} tokens leaves its block of {self.block_tokens:,}"
            fix = "make block_tokens a multiple of every sequence length, and offsets multiples of the sequence length"
            raise UserError(found, fix)


def _map_file(manifest: Manifest, number: int) -> Tokens:
    file = manifest.files[number]
    path = manifest.path(file)
    try:
        tokens: Tokens = np.memmap(path, dtype=manifest.dtype, mode="r").view(np.ndarray)
    except (FileNotFoundError, ValueError):  # ValueError: an empty file, or one that ends inside a token
        tokens = np.empty(0, dtype=manifest.dtype)
    if len(tokens) != file.tokens:
        found = f"{len(tokens):,} tokens where the manifest says {file.tokens:,}"
        raise UserError(found, "restore the file, or make the folder again with `smol tokenize`", path)
    return tokens


def _order(blocks: int, seed: int, source: str, epoch: int) -> Permutation:
    return Permutation(blocks, epoch_key(seed, source, epoch))
