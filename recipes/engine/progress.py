"""The line that a person follows while a stage trains, and what a GPU could do at best."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import torch

from recipes.plan import H100_FLOPS, StagePlan

PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": H100_FLOPS,
    "NVIDIA H200": H100_FLOPS,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}
"""Dense bf16 FLOP/s by device name, from NVIDIA's data sheets."""
SECONDS_BETWEEN_LINES = 10.0
"""Where the output is no terminal."""


def peak_flops(dtype: torch.dtype) -> float | None:
    """FLOP/s of this process's GPU at best; None where it is unknown, and for other types than bf16."""
    if dtype is not torch.bfloat16 or not torch.cuda.is_available():
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name())


class ProgressLine:
    """One line a stage, rewritten in place on a terminal, else written every ten seconds."""

    def __init__(self, stage: StagePlan) -> None:
        self.stage = stage
        self._began = time.monotonic()
        self._first_step: int | None = None
        self._written = -SECONDS_BETWEEN_LINES

    def show(self, metrics: dict[str, Any], always: bool = False) -> None:
        """Shows a step's metrics; `always` even if the last line is younger than ten seconds."""
        now, on_terminal = time.monotonic(), sys.stdout.isatty()
        if self._first_step is None:
            self._began, self._first_step = now, metrics["step"]
        if not (on_terminal or always or now - self._written >= SECONDS_BETWEEN_LINES):
            return
        self._written = now
        text = self._text(metrics, now)
        last = metrics["step"] == self.stage.end_step
        print(f"\r{text}\x1b[K" if on_terminal else text, end="" if on_terminal and not last else "\n", flush=True)

    def _text(self, metrics: dict[str, Any], now: float) -> str:
        assert self._first_step is not None
        parts = [
            f"{self.stage.name}  step {metrics['step']:,}/{self.stage.end_step:,}",
            f"loss {metrics['loss']:.3f}", f"lr {metrics['lr']:.2e}", f"{metrics['tokens_per_s']:,.0f} tokens/s",
        ]  # fmt: skip
        if metrics["mfu"] is not None:
            parts.append(f"MFU {metrics['mfu']:.0%}")
        if done := metrics["step"] - self._first_step:
            seconds = (now - self._began) / done * (self.stage.end_step - metrics["step"])
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        return "  ".join(parts)
