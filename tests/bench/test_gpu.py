"""The GPU's measurements, dry: all of them run on a CPU with a tiny model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.bench.gpu import (
    ALL,
    DETERMINISTIC,
    FUSED,
    LATE,
    OTHERS,
    OVER,
    PLAIN,
    SHIPPED,
    Bench,
    bench_gpu,
    collect,
    fitting,
    largest,
    loss_difference,
    tiny_recipe,
)
from recipes.bench.gpu_show import verdict
from recipes.engine.gpu_case import OUT_OF_MEMORY, Case
from recipes.errors import UserError
from recipes.loader import load
from recipes.show import wide_console

pytestmark = pytest.mark.slow


def bench_of(folder: Path, seconds: float = 300) -> Bench:
    """A bench of the tiny model whose measurements are processes of their own."""
    tiny = tiny_recipe(load("smollm2-1.7b"), folder)
    return Bench(tiny, tiny, folder, wide_console(), False, 2, 2, time.monotonic() + seconds)


def test_correctness_and_variants_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: FUSED[name] for name in ("norm", "loss", ALL)}  # each by itself: tests/engine/test_fused.py
    monkeypatch.setattr("recipes.bench.gpu.FUSED", some)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # test_fused compiles the layer
    result = bench_gpu(tmp_path / "gpu.json", steps=2, tiny=True, loss_steps=8, minutes=60)
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    checked = {row["what"]: row for row in result["correctness"]}
    assert checked.pop("flash-attn")["met"] is None or result["products"]["flash_attn"]
    assert all(row["met"] for row in checked.values()), checked
    assert {"ten steps, its stand-ins", "ten steps, all", "resume: what differs", "conversion's logits"} <= set(checked)
    assert {f"8 steps, {name}" for name in some} <= set(checked)
    speeds = {row["name"]: row for row in result["speed"]}
    assert {SHIPPED, PLAIN, *some, LATE, OTHERS, "all, micro-batch 8", f"{PLAIN}, micro-batch 8"} == set(speeds)
    assert not [row for row in speeds.values() if "failed" in row]
    assert speeds[PLAIN]["losses"][:7] == speeds[SHIPPED]["losses"] and len(speeds[PLAIN]["losses"]) == 8 + 5
    assert 0 < speeds[ALL]["loss_difference"] < 2**-8 and speeds[ALL]["losses_compared"] == 13
    assert speeds["all, micro-batch 8"]["loss_difference"] is None, "other data"
    assert speeds[LATE]["losses"] == speeds[ALL]["losses"][:7]
    assert speeds[PLAIN]["tokens_per_second"] == pytest.approx(4 * 64 / speeds[PLAIN]["step_seconds"])
    shown = capsys.readouterr().out
    assert "Is training right here? A dry run" in shown and "its speeds mean nothing" in shown


def test_a_case_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    cases = Case("products", "products", steps=2), Case("logits", "logits", paths={"run": "nowhere"})
    good, bad = bench_of(tmp_path).run(*cases, together=True)
    assert good["flops_per_second"] > 0 and "failed" not in good
    assert bad["name"] == "logits" and bad["failed"].startswith("exit code 1: ") and "this is no run" in bad["failed"]


def test_when_the_time_is_over_nothing_is_begun_and_what_runs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (late,) = bench_of(tmp_path / "late", seconds=1).run(Case("products", "products"))
    assert late["failed"] == OVER and not (tmp_path / "late" / "said.txt").exists()
    monkeypatch.setattr("recipes.bench.gpu.LEAST_SECONDS", 0.0)
    child = "import os, pathlib, time; pathlib.Path('PID').write_text(str(os.getpid())); time.sleep(90)"
    bench, began = bench_of(tmp_path, seconds=2), time.monotonic()
    assert list(bench.python("-c", child.replace("PID", str(tmp_path / "pid"))))[-1] == OVER
    assert time.monotonic() - began < 60
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_every_row_is_written_before_the_next_is_measured(tmp_path: Path) -> None:
    path, result = tmp_path / "gpu.json", {"products": {}}

    def rows() -> Iterator[dict[str, Any]]:
        for n in range(3):
            assert n == 0 or len(json.loads(path.read_text())["correctness"]) == n
            yield {"what": "x", "found": 0, "note": ""}

    collect("correctness", rows(), result, bench_of(tmp_path), path)
    assert len(json.loads(path.read_text())["correctness"]) == 3


def test_resuming_is_measured_with_strictly_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    try:
        exec(DETERMINISTIC, {})
        assert torch.are_deterministic_algorithms_enabled() and sys.modules["flash_attn"] is None
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        sys.modules.pop("flash_attn", None)


def test_the_largest_micro_batch_fills_what_the_state_leaves(tmp_path: Path) -> None:
    recipe = load("smollm2-1.7b")
    bench = replace(bench_of(tmp_path), recipe=recipe)
    state = 18 * 1_711_376_384
    four = state + 4 * 4e9
    assert fitting(four, bench, {"memory": 150e9}) == int((0.93 * 150e9 - state) / 4e9) == 27
    assert fitting(four, bench, {}) == 8


def test_a_micro_batch_that_is_too_large_is_followed_by_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def run(self: Bench, case: Case) -> Iterator[dict[str, Any]]:  # no memory is full here
        tried.append(case.config["tokens"]["micro_batch_size"])
        yield {"name": case.name, **({"failed": OUT_OF_MEMORY} if tried[-1] > 20 else {})}

    monkeypatch.setattr(Bench, "run", run)
    bench = replace(bench_of(tmp_path), recipe=load("smollm2-1.7b"))
    row = {"name": ALL, "memory": 18 * 1_711_376_384 + 4 * 4e9}
    assert len(list(largest(bench, {"memory": 150e9}, row, {}))) == 3 and tried == [27, 24, 21]
    assert list(largest(bench, {"memory": 40e9}, row, {})) == []
    assert list(largest(bench, {"memory": 150e9}, {**row, "failed": "x"}, {})) == []


def test_only_a_row_with_the_right_losses_counts_for_the_gain() -> None:
    row = {"kind": "repository", "mfu": 0.4, "tokens_per_second": 1, "replaced": ["flash_attn"], "losses_compared": 205}
    good, wrong = {"name": "good", "gain": 1.1, "loss_difference": 1e-3}, {"name": "wrong", "loss_difference": 1e-2}
    said = verdict([row | good, row | wrong | {"gain": 1.5, "mfu": 0.6, "tokens_per_second": 2}])
    assert said.startswith("60.0% MFU with “wrong”") and "1.10 times Nanotron's own model (with stand-ins" in said
    assert "with “good”" in said and "over 205 steps" in said
    assert verdict([row | wrong | {"gain": 1.5}]).count("times") == 0
    assert verdict([{"failed": "x"}]) == "Nothing of this repository was measured."


def test_losses_are_compared_by_their_largest_relative_difference() -> None:
    ours: dict[str, Any] = {"losses": [2.0, 1.1]}
    assert loss_difference(ours, {"losses": [2.0, 1.0]}) == pytest.approx(0.1)
    assert loss_difference({"failed": "out of memory"}, ours) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_tiny_model_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finds no GPU on this machine\. .*--tiny"):
        bench_gpu(tmp_path / "gpu.json")
    assert not (tmp_path / "gpu.json").exists()
