"""The GPU's measurements, dry: all of them run on a CPU with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.bench_gpu import ALL, FUSED, PLAIN, SHIPPED, Bench, bench_gpu, loss_difference, tiny_recipe
from recipes.engine.gpu_case import Case
from recipes.errors import UserError
from recipes.loader import load
from recipes.show import wide_console

pytestmark = pytest.mark.slow


def test_correctness_and_every_variant_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_gpu(tmp_path / "gpu.json", steps=2, tiny=True, loss_steps=8)
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    checked = {row["what"]: row for row in result["correctness"]}
    assert all(row["met"] for row in checked.values()), checked
    assert {"ten steps, stand-ins", "ten steps, all", "resume: what differs", "conversion's logits"} <= set(checked)
    speeds = {row["name"]: row for row in result["speed"]}
    assert {SHIPPED, PLAIN, *FUSED, "transformers, compiled", "all, micro-batch 8"} <= set(speeds)
    assert not [row for row in speeds.values() if "failed" in row]
    assert speeds[PLAIN]["losses"] == speeds[SHIPPED]["losses"] and len(speeds[PLAIN]["losses"]) == 8 + 5
    assert 0 < speeds[ALL]["loss_difference"] < 2**-8
    assert speeds[PLAIN]["tokens_per_second"] == pytest.approx(4 * 64 / speeds[PLAIN]["step_seconds"])
    shown = capsys.readouterr().out
    assert "Is training right here?" in shown and "its speeds mean nothing" in shown


def test_a_case_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    tiny = tiny_recipe(load("smollm2-1.7b"), tmp_path)
    bench = Bench(tiny, tiny, tmp_path, wide_console(), dry=False, steps=2, loss_steps=2)
    good, bad = bench.run(Case("products", "products", steps=2), Case("logits", "logits", paths={"run": "nowhere"}))
    assert good["flops_per_second"] > 0 and "failed" not in good
    assert bad["name"] == "logits" and bad["failed"].startswith("exit code 1: ") and "this is no run" in bad["failed"]


def test_losses_are_compared_by_their_largest_relative_difference() -> None:
    ours: dict[str, Any] = {"losses": [2.0, 1.1]}
    assert loss_difference(ours, {"losses": [2.0, 1.0]}) == pytest.approx(0.1)
    assert loss_difference({"failed": "out of memory"}, ours) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_tiny_model_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finds no GPU on this machine\. .*--tiny"):
        bench_gpu(tmp_path / "gpu.json")
    assert not (tmp_path / "gpu.json").exists()
