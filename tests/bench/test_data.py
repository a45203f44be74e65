"""The benchmark runs and reports what it measured; its greedy index is the usual one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recipes.bench.data import Figure, bench_data, greedy_index
from recipes.errors import UserError


def test_greedy_index_takes_the_largest_error() -> None:
    weights, counts = np.array([0.2, 0.5, 0.3]), np.zeros(3)
    sources, numbers = greedy_index(weights.tolist(), 300, seconds=60)
    for n in range(300):
        expected = int(np.argmax(weights * max(n, 1) - counts))
        assert (sources[n], numbers[n]) == (expected, counts[expected])
        counts[expected] += 1


def test_greedy_index_stops_when_its_time_is_over() -> None:
    sources, numbers = greedy_index([0.5, 0.5], 10**9, seconds=0)
    assert len(sources) == len(numbers) < 10**9


def test_a_figure_knows_its_right_side() -> None:
    assert Figure("speed", 201, "MB/s", 200, least=True).met
    assert not Figure("speed", 199, "MB/s", 200, least=True).met
    assert Figure("memory", 49, "B", 50, least=False).met
    assert not Figure("memory", 51, "B", 50, least=False).met


@pytest.mark.slow
def test_bench_data_measures_the_real_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    result = bench_data(path, read_tokens=4_000_000, index_samples=200_000)
    assert json.loads(path.read_text()) == result
    assert (result["stage"], result["interleave"]["period"]) == ("stage4", 5000)
    assert len(result["figures"]) == 7
    assert all(figure["value"] > 0 for figure in result["figures"])
    built, stage, run = result["index"]
    assert (built["samples"], built["bytes"]) == (200_000, 1_800_000)
    assert (stage["samples"], run["samples"]) == (482_948_096, 5_365_760_000)
    assert stage["seconds"] == pytest.approx(built["seconds"] * stage["samples"] / built["samples"])
    shown = capsys.readouterr().out
    assert "5,365,760,000" in shown and "greedy" in shown


def test_bench_data_names_a_stage_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no stage 'stage9'"):
        bench_data(stage="stage9")
