"""What Nanotron's writers would put on disk, held in host memory until a thread writes it: training waits for the copy.

The writers are Nanotron's own, unchanged: inside `Snapshot.take` their calls of `torch.save` and of safetensors'
`save_file` only remember what they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import recipes.engine.compat  # noqa: F401  before nanotron

# isort: split
from nanotron.serialize import weights


class Snapshot:
    """The files of one checkpoint, in buffers that the next one uses again: pinned ones are slow to come by."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0
        self._writes: list[Callable[[], None]] = []

    @property
    def nbytes(self) -> int:
        """Host memory that is held for it."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Inside, what the writers are given is copied and remembered; what was remembered before is forgotten."""
        self._used, self._writes = 0, []
        save, save_file = torch.save, weights.save_file
        torch.save = partial(self._remember, save)
        weights.save_file = partial(self._remember, save_file)
        try:
            yield
        finally:
            torch.save, weights.save_file = save, save_file
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self) -> None:
        """Writes the files; once. Any thread may.

        Raises:
            OSError, RuntimeError, SafetensorError: the disk is full, or failed.
        """
        for write in self._writes:
            write()
        self._writes = []

    def _remember(self, write: Callable[..., None], content: Any = None, /, *args: Any, **options: Any) -> None:
        held, options = tree_map(self._hold, (content, options))
        self._writes.append(partial(write, *([] if content is None else [held]), *args, **options))

    def _hold(self, leaf: Any) -> Any:
        """A copy of a tensor; what cannot change stays itself."""
        if not isinstance(leaf, Tensor):
            assert not hasattr(leaf, "__setitem__"), f"a {type(leaf)} would go on changing"
            return leaf
        number, self._used = self._used, self._used + 1
        if number == len(self._buffers) or not _alike(self._buffers[number], leaf):
            self._buffers[number:] = [torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu", pin_memory=leaf.is_cuda)]
        with torch.no_grad():
            self._buffers[number].copy_(leaf, non_blocking=True)
        return self._buffers[number]


def _alike(buffer: Tensor, tensor: Tensor) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
