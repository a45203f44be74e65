"""The progress line."""

from __future__ import annotations

import os
import pty
import re
import sys
import time
from typing import Any

import pytest
import torch

from recipes.engine.progress import ProgressLine, peak_flops
from recipes.loader import load
from recipes.plan import make_plan
from tests.engine.tiny_run import ROOT

STAGE = make_plan(load("smollm2-1.7b", ROOT)).stages[1]


def metrics(step: int) -> dict[str, Any]:
    """A step's metrics."""
    return {"step": step, "loss": 2.34567, "lr": 5e-4, "tokens_per_s": 6_912_345.6, "mfu": 0.404}


def test_a_line_says_where_it_is_how_well_how_fast_and_how_long_to_go(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(STAGE)
    line.show(metrics(3_000_000))
    time.sleep(0.15)
    line.show(metrics(3_000_001), always=True)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "stage2  step 3,000,000/3,814,697  loss 2.346  lr 5.00e-04  6,912,346 tokens/s  MFU 40%"
    left = re.fullmatch(r"stage2  step 3,000,001/.*  MFU 40%  (\d+) days?, (\d+):\d\d:\d\d left", second)
    assert left and int(left[1]) * 24 + int(left[2]) >= 33  # 814,696 steps of 0.15 seconds or a little more


def test_where_the_output_is_no_terminal_few_lines_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(STAGE)
    for step in range(3_000_000, 3_000_100):
        line.show(metrics(step))
    line.show(metrics(3_000_100), always=True)
    assert [text.split("/")[0] for text in capsys.readouterr().out.splitlines()] == [
        "stage2  step 3,000,000", "stage2  step 3,000,100",
    ]  # fmt: skip


def test_on_a_terminal_one_line_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        line = ProgressLine(STAGE)
        for step in (3_814_695, 3_814_696, 3_814_697):
            line.show(metrics(step) | {"mfu": None})
        shown = ""
        while "\n" not in shown:
            shown += os.read(reader, 10_000).decode()
    assert shown.count("\r") == 4 and shown.count("\n") == 1 and "MFU" not in shown  # the terminal's own \r\n


def test_without_a_known_gpu_there_is_no_peak() -> None:
    assert peak_flops(torch.float32) is None
    if not torch.cuda.is_available():
        assert peak_flops(torch.bfloat16) is None
