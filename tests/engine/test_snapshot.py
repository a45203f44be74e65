"""What is held is what would have been written, whatever becomes of the model in the meantime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.engine.snapshot import Snapshot

# isort: split
from nanotron.serialize import weights


def write_state(folder: Path, factor: float) -> dict[str, torch.Tensor]:
    """Writes as Nanotron does, by torch.save and save_file; returns the tensors that were written."""
    state = {"moments": factor * torch.arange(6.0).view(2, 3), "weight": torch.full((4,), factor, dtype=torch.bfloat16)}
    folder.mkdir(exist_ok=True)
    torch.save({"state": {0: {"exp_avg": state["moments"], "step": 3}}, "names": ["a"]}, folder / "optimizer.pt")
    weights.save_file(tensors={"data": state["weight"]}, filename=folder / "w.safetensors", metadata={"version": "1"})
    return state


def test_the_files_are_those_that_would_have_been_written(tmp_path: Path) -> None:
    snapshot = Snapshot()
    for factor in (1.0, 2.0):
        write_state(tmp_path / "now", factor)
        with snapshot.take():
            state = write_state(tmp_path / "held", factor)
        assert not (tmp_path / "held" / "optimizer.pt").exists() or factor == 2.0
        for tensor in state.values():
            tensor.zero_()  # training goes on
        snapshot.write()
        for name in ("optimizer.pt", "w.safetensors"):
            assert (tmp_path / "held" / name).read_bytes() == (tmp_path / "now" / name).read_bytes()
    assert snapshot.nbytes == 6 * 4 + 4 * 2, "the buffers are used again"


def test_nothing_is_held_back_outside(tmp_path: Path) -> None:
    save, save_file = torch.save, weights.save_file
    with pytest.raises(RuntimeError), Snapshot().take():
        raise RuntimeError
    assert (torch.save, weights.save_file) == (save, save_file)


def test_what_would_change_with_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="go on changing"), Snapshot().take():
        torch.save(bytearray(3), tmp_path / "x")
