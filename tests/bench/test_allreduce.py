"""The all-reduce on paper: against sums done by hand, and what must hold of any recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.bench.allreduce import BUCKET, Network, bench_allreduce, buckets_of, exchange, exchanges
from recipes.errors import UserError
from recipes.loader import load
from recipes.recipe import Model

ROOT = Path(__file__).resolve().parents[2]
LARGE = load("smollm2-1.7b", ROOT)
MODELS = [LARGE.model, *(load(name, ROOT).model for name in ("smollm2-135m", "smollm2-360m"))]


@given(st.sampled_from(MODELS), st.floats(1, 1e10))
@settings(deadline=None)
def test_the_buckets_hold_every_gradient_once(model: Model, least: float) -> None:
    buckets = buckets_of(model, least)
    assert sum(buckets) == model.parameters
    assert all(size >= least for size in buckets[:-1])


def test_the_17bs_step_is_what_a_calculator_gives() -> None:
    found = exchange(LARGE, 4, 1, 4, 256, 0.5, 1e10)  # one bucket: nothing is ready before the end
    assert found.bytes == 1_711_376_384 * 4
    by_hand = 2 * 255 / 256 * 6_845_505_536 / (8 * 50e9 * 0.8) + 2 * 255 * 5e-6
    assert found.reduce_seconds == found.exposed_seconds == pytest.approx(by_hand)
    flops = 4 * 2048 * (6 * 1_711_376_384 + 12 * 24 * 2048 * 2048)
    assert found.compute_seconds == pytest.approx(flops / (989e12 * 0.5), rel=1e-3)
    assert found.hidden_behind_seconds == pytest.approx(found.compute_seconds * 2 / 3)
    assert found.lost == pytest.approx(by_hand / (by_hand + found.compute_seconds))


def test_more_accumulation_hides_less_and_half_the_bytes_take_less() -> None:
    rows = [row for row in exchanges(LARGE, 256, bucket_values=(16 * BUCKET,)) if row.value_bytes == 4]
    assert [(row.micro_batch, row.accumulation) for row in rows] == [(4, 1), (2, 2), (1, 4)]
    assert len({row.compute_seconds for row in rows}) == 1
    lost = [row.lost for row in rows]
    assert lost == sorted(lost) and lost[0] < lost[-1]
    full, half = (exchange(LARGE, 1, 4, size, 256, 0.5, 16 * BUCKET) for size in (4, 2))
    assert half.reduce_seconds < full.reduce_seconds and half.lost < full.lost


@given(st.integers(2, 4096), st.floats(1, 1e11))
def test_a_ring_moves_less_than_twice_the_bytes(gpus: int, size: float) -> None:
    network = Network(hop_seconds=0, efficiency=1)
    assert size / 400e9 <= network.ring_seconds(size, gpus) * (1 + 1e-9) < 2 * size / 400e9 * (1 + 1e-9)


def test_a_number_of_gpus_that_does_not_divide_the_step_is_refused() -> None:
    with pytest.raises(UserError, match="no whole number of sequences of 2,048 on 255 GPUs"):
        list(exchanges(LARGE, 255))


def test_what_is_printed_is_what_the_docs_show_and_json_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = bench_allreduce("smollm2-1.7b", 256, 0.5, tmp_path / "reduce.json")
    assert json.loads((tmp_path / "reduce.json").read_text()) == result
    assert len(result["exchanges"]) == 2 * 3 * 2 and {"machine", "versions", "code", "network"} <= set(result)
    assert [f"{row['lost']:.1%}" for row in result["exchanges"][:2]] == ["34.9%", "29.8%"]
    shown = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    documented = [cells(line) for line in (ROOT / "docs" / "benchmarks.md").read_text().splitlines()]
    assert len(shown) == 2 + 12
    assert [row for row in shown if row not in documented and "---" not in row[0]] == []


def cells(line: str) -> list[str]:
    """Of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]
