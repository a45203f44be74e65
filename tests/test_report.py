from __future__ import annotations

import re

from recipes.audit import audit
from recipes.files import append_line, write_json
from recipes.report import heldout_losses, write_report
from recipes.run import Run
from tests.test_audit import feed


def test_the_report_is_one_file_that_shows_what_happened(tiny_run: Run) -> None:
    feed(tiny_run, "stage1", [23])
    folder = tiny_run.stage_folder("stage1")
    for step in range(1, 24):
        seconds = {"data": 0.1, "step": 1.0, "checkpoint": 0.0}
        line = {"step": step, "loss": 6.0 - step / 10, "lr": 1e-3, "tokens_per_s": 256.0, "seconds": seconds}
        append_line(folder / "metrics.jsonl", line)
    losses = {
        "start": {"web": {"loss": 6.0}, "code": {"loss": 6.1}},
        "end": {"web": {"loss": 5.0}, "code": {"loss": 6.2}},
    }
    write_json(folder / "heldout.json", losses)
    append_line(tiny_run.folder / "events.jsonl", {"event": "killed", "stage": "stage1", "step": 12, "checkpoint": 10})
    page = write_report(tiny_run, audit(tiny_run)).read_text()
    assert list(heldout_losses(tiny_run)) == [("stage1", "web", 6.0, 5.0), ("stage1", "code", 6.1, 6.2)]
    assert "did not fall" in page and "killed with SIGKILL after step 12, resumed from step 10" in page
    assert "23 of 42" in page and "yes, to the token" in page
    assert len(re.findall("<svg", page)) == 4
    assert not re.search(r"(src|href)=[\"']?https?:", page), "the page must not need a network"
