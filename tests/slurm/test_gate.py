from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from recipes.cli_cluster import approve as approve_verb
from recipes.errors import UserError
from recipes.files import append_line, checksum, read_lines
from recipes.run import ADOPTION, Run
from recipes.slurm.gate import approval, approve, check, difference, record
from recipes.slurm.order import prepare
from recipes.slurm.profile import load_cluster


@pytest.fixture
def launched(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that has gates."""
    load_cluster("virtual").freeze(tiny_run.folder)
    monkeypatch.chdir(tiny_run.folder.parent.parent)
    return tiny_run


def propose(run: Run, web: str = "0.70", math: str = "0.10") -> Path:
    """A proposal for stage 2, with five points moved from web to math unless told otherwise."""
    text = run.recipe.stage("stage2").mixture_file.read_text()
    path = run.folder / "proposals" / "stage2.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.replace("share: 0.75", f"share: {web}").replace("share: 0.05", f"share: {math}"))
    return path


def share(run: Run, domain: str) -> float:
    return float(Run.load(run.folder).recipe.stage("stage2").mixture.domains[domain].share)


def test_a_run_by_hand_has_no_gates(tiny_run: Run) -> None:
    check(tiny_run, "stage2")
    check(tiny_run.folder, "stage2")


def test_nothing_starts_without_an_approval(launched: Run) -> None:
    with pytest.raises(UserError, match=r"nobody has approved a mixture for stage2\. .*smol approve tiny stage2"):
        check(launched.folder, "stage2")


def test_without_a_proposal_the_runs_own_mixture_is_approved(launched: Run) -> None:
    approval = approve("tiny", "stage2", who="anna")
    file = launched.recipe.stage("stage2").mixture_file
    assert (approval["hash"], approval["who"]) == (checksum(file), "anna")
    assert (approval["proposal"], approval["overridden"]) == (None, False)
    assert launched.folder / approval["mixture"] == file
    assert json.loads((launched.folder / "approvals" / "stage2.json").read_text()) == {
        key: value for key, value in approval.items() if key not in ("released", "note")
    }
    assert approval["released"] == [] and "no job of stage2 has been submitted" in approval["note"]
    check(launched.folder, "stage2")
    events = read_lines(launched.folder / "events.jsonl")
    assert [(e["event"], e["stage"], e["who"]) for e in events] == [("gate", "stage2", "anna")]


def test_a_proposal_that_differs_asks_for_a_choice_and_shows_it(launched: Run) -> None:
    propose(launched)
    with pytest.raises(UserError) as error:
        approve("tiny", "stage2")
    assert "web: 75.00% → 70.00%\n  math: 5.00% → 10.00%" in str(error.value)
    assert "--proposal" in str(error.value) and "--keep" in str(error.value)
    assert approval(launched.folder, "stage2") is None and not (launched.folder / ADOPTION).exists()


def test_the_proposal_is_adopted(launched: Run) -> None:
    proposal = propose(launched)
    approval = approve("tiny", "stage2", use_proposal=True)
    assert (approval["proposal"], approval["overridden"]) == (checksum(proposal), False)
    assert share(launched, "math") == 0.10
    check(launched.folder, "stage2")


def test_keeping_overrides_the_proposal(launched: Run) -> None:
    proposal = propose(launched)
    approval = approve("tiny", "stage2", keep=True)
    assert (approval["proposal"], approval["overridden"]) == (checksum(proposal), True)
    assert share(launched, "math") == 0.05
    check(launched.folder, "stage2")


def test_a_proposal_of_the_same_shares_needs_no_choice(launched: Run) -> None:
    propose(launched, "0.750", "0.05")
    assert approve("tiny", "stage2")["overridden"] is False


@pytest.mark.parametrize(("web", "math", "overridden"), [("0.60", "0.20", True), ("0.70", "0.10", False)])
def test_another_file_is_adopted(launched: Run, tmp_path: Path, web: str, math: str, overridden: bool) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(propose(launched, web, math).read_text() + "# mine\n")
    propose(launched)
    approval = approve("tiny", "stage2", mixture=mine)
    assert approval["overridden"] is overridden and share(launched, "math") == float(math)
    check(launched.folder, "stage2")


@pytest.mark.parametrize("begun", [False, True])
def test_an_edit_after_the_approval_is_refused_with_the_difference(launched: Run, begun: bool) -> None:
    approve("tiny", "stage2")
    if begun:
        launched.stage_folder("stage2").mkdir()
        append_line(launched.stage_folder("stage2") / "ledger.jsonl", {"from_step": 23, "to_step": 24, "tokens": {}})
    file = launched.recipe.stage("stage2").mixture_file
    file.write_text(
        file.read_text().replace("fineweb-edu: 0.60", "fineweb-edu: 0.59").replace("dclm: 0.40", "dclm: 0.41")
    )
    profile = launched.folder.parent.parent / "two.yaml"
    profile.write_text("extends: virtual\nnodes: 1\n")
    launch = partial(prepare, "tiny", str(profile), None, None, None)
    for refused in (partial(check, launched.folder, "stage2"), partial(approve_verb, "tiny", "stage2"), launch):
        with pytest.raises(UserError) as error:
            refused()
        text = str(error.value)
        assert "stage2 was edited after" in text
        assert re.search(r"^-.*fineweb-edu: 0.60", text, re.MULTILINE) and re.search(
            r"^\+.*dclm: 0.41", text, re.MULTILINE
        )


def test_a_stage_that_has_begun_keeps_its_mixture(launched: Run) -> None:
    approve("tiny", "stage2")
    before = (launched.folder / "approvals" / "stage2.json").read_bytes()
    propose(launched)
    launched.stage_folder("stage2").mkdir()
    append_line(launched.stage_folder("stage2") / "ledger.jsonl", {"from_step": 23, "to_step": 24, "tokens": {}})
    with pytest.raises(UserError, match="stage2 has begun"):
        approve("tiny", "stage2", use_proposal=True)
    assert (launched.folder / "approvals" / "stage2.json").read_bytes() == before


def test_approving_twice_keeps_the_first_date_and_one_event(launched: Run) -> None:
    propose(launched)
    first = approve("tiny", "stage2", use_proposal=True, who="anna")
    again = approve("tiny", "stage2", who="berta")
    assert again == first
    assert len(read_lines(launched.folder / "events.jsonl")) == 1


@pytest.mark.parametrize("killed_in", [f"recipes.slurm.gate.{name}" for name in ("record", "write_json", "release")])
def test_an_approval_that_was_killed_is_finished_by_the_next(
    launched: Run, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    propose(launched)
    monkeypatch.setattr(killed_in, kill)
    with pytest.raises(Killed):
        approve("tiny", "stage2", use_proposal=True)
    monkeypatch.undo()
    monkeypatch.chdir(launched.folder.parent.parent)
    assert approve("tiny", "stage2", use_proposal=True)["overridden"] is False
    check(launched.folder, "stage2")
    assert share(launched, "math") == 0.10


def test_options_that_contradict_each_other(launched: Run) -> None:
    with pytest.raises(UserError, match="choose one of them".capitalize()):
        approve("tiny", "stage2", use_proposal=True, keep=True)
    with pytest.raises(UserError, match="there is no proposal for stage2"):
        approve("tiny", "stage2", use_proposal=True)
    with pytest.raises(UserError, match="has no stage 'stage7'"):
        approve("tiny", "stage7")


def test_the_first_stage_is_recorded_at_launch(launched: Run) -> None:
    record(launched, "stage1", "anna@host")
    check(launched.folder, "stage1")


def test_a_mixture_of_other_sources_alone_is_shown(launched: Run) -> None:
    before = launched.recipe.stage("stage2").mixture
    web = before.domains["web"].model_copy(update={"sources": {"dclm": before.domains["web"].share}})
    after = before.model_copy(update={"domains": {**before.domains, "web": web}})
    assert difference(before, after) == "  web: 75.00% of other sources"


def test_where_slurm_is_missing_the_approval_stands(launched: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    append_line(
        launched.folder / "jobs.jsonl", {"id": 5, "kind": "train", "stage": "stage2", "name": "tiny-stage2-train"}
    )
    monkeypatch.setenv("PATH", "/nowhere")
    approval = approve("tiny", "stage2")
    assert "there is no Slurm on this machine" in approval["note"] and "smol approve tiny stage2" in approval["note"]
    check(launched.folder, "stage2")
