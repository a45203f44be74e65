from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from recipes.errors import UserError
from recipes.files import append_line
from recipes.run import Run
from recipes.slurm import commands
from recipes.slurm.dry_run import code_text
from recipes.slurm.existing import check_start, done, lacking, stage_to_go_back_in
from recipes.slurm.gate import approve, record
from recipes.slurm.jobs import facts, main, next_step, source
from recipes.slurm.launch import launch, locked, options
from recipes.slurm.order import Order, check_data, prepare
from tests.conftest import ROOT, TINY, write_source
from tests.test_loader import change

SUITE = """
benchmarks:
  docs-choice: {metric: acc, shots: 0, items: 10, chance: 25, domains: [web]}
  code-choice: {metric: acc, shots: 0, items: 10, chance: 25, domains: [code]}
"""
PROFILE = "extends: virtual\nnodes: 2\ngpus_per_node: 1\nevaluation: {{suite: {suite}}}\n"


@pytest.fixture
def site(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clone's folder with the recipe tiny, its data, a suite and a profile of two GPUs; Slurm is not installed."""
    tokenizer = tree / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"vocab": {f"t{i}": i for i in range(512)}}, "added_tokens": []}))
    (tree / "stages" / "tiny").mkdir()
    (tree / "stages" / "tiny" / "recipe.yaml").write_text(TINY)
    (tree / "suite.yaml").write_text(SUITE)
    (tree / "mine.yaml").write_text(PROFILE.format(suite=tree / "suite.yaml"))
    monkeypatch.chdir(tree)
    bin_folder = tree / "bin"
    bin_folder.mkdir()
    for name in ("git", "bash"):
        (bin_folder / name).symlink_to(shutil.which(name) or "/nowhere")
    monkeypatch.setenv("PATH", str(bin_folder))
    yield tree


def order(**changed: str | Path | None) -> Order:
    wanted = {"recipe_name": "tiny", "cluster": "mine.yaml", "stages": None, "run_name": None, "data": None}
    return prepare(**{**wanted, **changed})  # type: ignore[arg-type]


def go(dry_run: bool = False, **changed: str | Path | int | None) -> tuple[int, str]:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    wanted = {"recipe_name": "tiny", "cluster": "mine.yaml", "stages": None, "run_name": None, "data": None}
    code = launch(**{**wanted, "tokenizer": None, **changed}, dry_run=dry_run, console=console)  # type: ignore[arg-type]
    return code, console.export_text()


def add_data(site: Path) -> None:
    made = order()
    sha256 = __import__("hashlib").sha256((site / "tokenizer.json").read_bytes()).hexdigest()
    for name in {name for stage in made.stages for name in stage.shares}:
        write_source(site / "data" / name, name, sha256)


def create(site: Path) -> Run:
    add_data(site)
    made = order()
    return Run.create(made.folder, made.recipe, site / "data", site / "tokenizer.json")


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_no_slurm_on_this_machine(site: Path) -> None:
    add_data(site)
    before = files(site)
    with pytest.raises(UserError, match=r"there is no Slurm on this machine: sbatch is not on the PATH\. Run this on"):
        go()
    assert files(site) == before


def test_a_dry_run_shows_everything_and_writes_nothing(site: Path) -> None:
    add_data(site)
    before = files(site)
    code, text = go(dry_run=True)
    assert code == 0 and files(site) == before
    for path in ("stage1/job.slurm", "stage1/eval.slurm", "stage1/propose.slurm"):
        assert f"tiny/{path} ─" in text
    assert "#SBATCH --job-name=tiny-stage1-train\n" in text and "#SBATCH --array=0-1%2\n" in text
    assert "as stage1/job.slurm, with stage4 for stage1" in text
    assert text.count("#SBATCH --job-name=") == 3
    assert "sbatch --test-only was left out" in text
    assert "held until smol approve tiny stage2" in text
    assert re.search(r"^run +runs/tiny, new", text, re.MULTILINE) and re.search(r"^data +data", text, re.MULTILINE)
    assert "warning: repetition not checked where the unique tokens are unknown" in text
    assert "GPU-hours at 40% MFU" in text and "nothing was written or submitted" in text


def test_a_dry_run_says_what_a_launch_would_refuse(site: Path) -> None:
    code, text = go(dry_run=True)
    assert code == 2
    assert "a launch would stop here: data: there is no such folder of tokenised sources" in text


def test_missing_data_is_named(site: Path) -> None:
    with pytest.raises(UserError, match=r"data: there is no such folder of tokenised sources.*--data"):
        check_data(order(), None, False, Console(quiet=True))
    (site / "data").mkdir()
    with pytest.raises(UserError, match=r"data/.*/manifest\.json: this file is missing"):
        check_data(order(), None, False, Console(quiet=True))
    add_data(site)
    check_data(order(), None, False, Console(quiet=True))
    content = bytearray((site / "data" / "dclm" / "00001.ds").read_bytes())
    content[7] ^= 1
    (site / "data" / "dclm" / "00001.ds").write_bytes(content)
    check_data(order(), None, False, Console(quiet=True))
    with pytest.raises(UserError, match="The file is corrupted"):
        check_data(order(), None, True, Console(quiet=True))
    (site / "data" / "dclm" / "00001.ds").write_bytes(content[:-2])
    with pytest.raises(UserError, match="The file is truncated"):
        check_data(order(), None, False, Console(quiet=True))


def test_data_of_another_tokenizer_is_named(site: Path) -> None:
    add_data(site)
    other = site / "other.json"
    other.write_text((site / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="made with tokenizer"):
        check_data(order(), str(other), False, Console(quiet=True))


def test_only_the_chosen_stages_data_is_needed(site: Path) -> None:
    add_data(site)
    later = set(order(stages="stage4").stages[0].shares) - set(order(stages="stage1").stages[0].shares)
    for name in later:
        shutil.rmtree(site / "data" / name)
    check_data(order(stages="stage1"), None, False, Console(quiet=True))
    with pytest.raises(UserError, match="this file is missing"):
        check_data(order(), None, False, Console(quiet=True))


def test_a_profile_of_the_right_size_is_named(site: Path) -> None:
    with pytest.raises(UserError, match=r"but the profile gives 1 nodes × 8 = 8\. Take h100-16x8, write `nodes: 16`"):
        order(recipe_name="smollm2-360m", cluster="single-node")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nodes: 2", "nodes: 1", r"tiny needs 2 GPUs \(dp 2 × tp 1 × pp 1\), but .* 1 nodes × 1 = 1.*nodes: 2"),
        ("nodes: 2", "nodes: 3", "but the profile gives 3 nodes × 1 = 3"),
        ("gpus_per_node: 1", "gpus_per_node: 4", "a multiple of a node's 4"),
        ("suite: /", "suite: no/such-suite/", "there is no suite"),
    ],
)  # fmt: skip
def test_a_profile_that_does_not_fit(site: Path, old: str, new: str, message: str) -> None:
    change(site, "mine.yaml", old, new)
    before = files(site)
    with pytest.raises(UserError, match=message):
        go()
    assert files(site) == before


@pytest.mark.parametrize("name", ["a b", "../x", "$(id)", "-x"])
def test_a_name_that_cannot_be_a_runs(site: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot stand in a job's name"):
        go(run_name=name)


def test_a_run_of_another_recipe_is_refused(site: Path) -> None:
    create(site)
    with pytest.raises(UserError, match="this folder holds a run of tiny, not of other"):
        shutil.copytree(site / "stages" / "tiny", site / "stages" / "other")
        change(site, "stages/other/recipe.yaml", "name: tiny", "name: other")
        go(recipe_name="other", run_name="tiny")


def test_a_recipe_that_was_edited_since_is_refused(site: Path) -> None:
    create(site)
    order()
    change(site, "stages/tiny/recipe.yaml", "seed: 7", "seed: 8")
    with pytest.raises(UserError, match=r"recipe\.yaml: this file is no longer what the run tiny was launched with"):
        go()


def test_an_approved_mixture_may_differ_and_an_edited_one_not(site: Path, tmp_path: Path) -> None:
    run = create(site)
    mixture = tmp_path / "closer.yaml"
    text = run.recipe.stage("stage2").mixture_file.read_text()
    mixture.write_text(text.replace("share: 0.75", "share: 0.70").replace("share: 0.05", "share: 0.10"))
    approve(run, "stage2", mixture=mixture)
    assert [link.gate for link in order().chain if link.kind == "train"] == [False, False, True, True]
    change(run.folder / "recipe", "mixtures/smollm2-1.7b/stage3.yaml", "share:", "share: ")
    with pytest.raises(UserError, match=r"stage3\.yaml: this file is no longer what the run"):
        order()


def test_the_recipes_mixture_edited_after_its_approval_is_refused_with_the_edit(site: Path, tmp_path: Path) -> None:
    run = create(site)
    record(run, "stage1", "anna")
    change(site, "mixtures/smollm2-1.7b/stage1.yaml", "fineweb-edu: 0.60", "fineweb-edu: 0.50")
    change(site, "mixtures/smollm2-1.7b/stage1.yaml", "dclm: 0.40", "dclm: 0.50")
    with pytest.raises(UserError) as error:
        order()
    text = str(error.value)
    assert "\n-      fineweb-edu: 0.60" in text and "\n+      fineweb-edu: 0.50" in text
    assert "\nRestore it from runs/tiny/approvals/stage1.yaml, or launch under another name" in text
    assert "smol approve tiny stage1 --mixture mixtures/smollm2-1.7b/stage1.yaml" in text
    run.stage_folder("stage1").mkdir()
    append_line(run.stage_folder("stage1") / "ledger.jsonl", {"from_step": 0, "to_step": 1, "tokens": {}})
    with pytest.raises(UserError) as error:
        order()
    assert "\n+      dclm: 0.50" in str(error.value) and "smol approve" not in str(error.value)


def test_the_recipes_mixture_may_be_the_approved_one(site: Path) -> None:
    run = create(site)
    change(site, "mixtures/smollm2-1.7b/stage2.yaml", "fineweb-edu: 0.60", "fineweb-edu: 0.50")
    change(site, "mixtures/smollm2-1.7b/stage2.yaml", "dclm: 0.40", "dclm: 0.50")
    with pytest.raises(UserError, match="To train stage2 on it instead: smol approve tiny stage2 --mixture"):
        order()
    approve(run, "stage2", mixture=site / "mixtures/smollm2-1.7b/stage2.yaml")
    assert order().run
    shutil.copy(ROOT / "mixtures/smollm2-1.7b/stage2.yaml", site / "mixtures/smollm2-1.7b/stage2.yaml")
    assert order().run
    change(site, "mixtures/smollm2-1.7b/stage2.yaml", "share: 0.05", "share: 0.050")
    with pytest.raises(UserError, match="no longer what the run tiny was launched with"):
        order()


def test_a_stage_needs_weights_to_start_from(site: Path) -> None:
    check_start(order(stages="..stage3"), {})
    with pytest.raises(UserError, match=r"stage2 starts from step 23 of stage1, which is neither trained nor queued"):
        check_start(order(stages="stage2.."), {})
    check_start(order(stages="stage2.."), {"tiny-stage1-train": [7]})
    assert "stage3 starts from step 31 of stage2" in go(dry_run=True, stages="stage3")[1]
    run = create(site)
    (run.checkpoints("stage1") / "23").mkdir(parents=True)
    (run.checkpoints("stage1") / "23" / "manifest.json").write_text("{}")
    check_start(order(stages="stage2.."), {})
    with pytest.raises(UserError, match="stage3 starts from step 31 of stage2"):
        check_start(order(stages="stage3"), {})


def test_what_a_killed_launch_has_left_out(site: Path) -> None:
    made = order()
    train, tests = (link.__class__(**{**link.__dict__, "jobs": 3}) for link in made.chain[:2])
    assert lacking(made, train, {}) == 3
    assert lacking(made, train, {train.name: [7]}) == 2
    assert lacking(made, train, {train.name: [8], tests.name: [9]}) == 0  # the others have been used up
    assert lacking(made, tests, {tests.name: [9]}) == 0


def test_other_data_than_the_runs_is_refused(site: Path, tmp_path: Path) -> None:
    create(site)
    assert order(data=site / "data").data == site / "data"
    with pytest.raises(UserError, match="the run's data is in"):
        order(data=tmp_path / "elsewhere")


def test_two_launches_at_once(site: Path) -> None:
    folder = site / "runs" / "tiny"
    with locked(folder):
        with locked(folder.with_name("another")):
            pass
        with pytest.raises(UserError, match="another launch of tiny is going on"), locked(folder):
            pass
    with locked(folder):
        pass
    assert list((site / "runs").iterdir()) == []


def test_dependencies(site: Path) -> None:
    change(site, "mine.yaml", "nodes: 2", "time_limit: 2m\nsignal_seconds: 40\nnodes: 2")
    made = order()
    train, tests, _, second = made.chain[:4]
    assert options(made, train, {}, 0) == []
    several = {train.name: [7, 8, 9]}
    assert options(made, tests, several, 0) == [
        "--dependency=afterok:7?afterok:8?afterok:9", "--kill-on-invalid-dep=yes",
    ]  # fmt: skip
    assert options(made, second, {"tiny-stage1-propose": [11]}, 0) == [
        "--dependency=afterok:11", "--kill-on-invalid-dep=yes", "--hold",
    ]  # fmt: skip
    spare = train.__class__(**{**train.__dict__, "jobs": 3})
    assert options(made, spare, {}, 0) == ["--dependency=singleton", "--kill-on-invalid-dep=yes"]
    both = spare.__class__(**{**spare.__dict__, "after": ("propose", "stage1"), "gate": True})
    assert options(made, both, {"tiny-stage1-propose": [11]}, 1)[0] == "--dependency=afterok:11,singleton"


def test_what_is_done_is_not_submitted_again(site: Path) -> None:
    run = create(site)
    made = order()
    train, tests, propose = made.chain[:3]
    assert not done(made, train)
    (run.checkpoints("stage1") / "23").mkdir(parents=True)
    (run.checkpoints("stage1") / "23" / "manifest.json").write_text("{}")
    assert done(made, train) and not done(made, propose)
    (run.folder / "proposals").mkdir()
    (run.folder / "proposals" / "stage2.yaml").write_text("")
    assert done(made, propose) and done(made, tests)


def test_what_squeue_prints() -> None:
    job = commands.parse_job("31|N/A|PENDING|2|0:00|4:00|JobHeldUser|t1-stage2-train|/w/runs/t1")
    assert (job.id, job.index, job.name, job.comment, job.live) == (31, "", "t1-stage2-train", "/w/runs/t1", True)
    task = commands.parse_job("29|0-1%1|PENDING|1|0:00|10:00|Dependency|t1-stage1-eval|(null)")
    assert (task.id, task.index, task.live) == (29, "0-1%1", True)
    ended = [
        commands.parse_job(f"1|N/A|{s}|1|0:00|1:00|None|n|c") for s in ("COMPLETED", "CANCELLED", "TIMEOUT", "FAILED")
    ]
    assert not any(job.live for job in ended)
    assert not commands.parse_job("1|N/A|PENDING|1|0:00|1:00|DependencyNeverSatisfied|n|c").live


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("squeue: fatal: Could not establish a configuration source", "but belongs to no cluster"),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "controller does not answer"),
    ],
)
def test_a_slurm_that_does_not_answer(site: Path, said: str, message: str) -> None:
    program = site / "bin" / "squeue"
    program.write_text(f"#!/bin/bash\necho '{said}' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(commands.Unreachable, match=message):
        commands.queue()


def test_only_the_jobs_of_the_runs_folder_are_its_own(site: Path) -> None:
    lines = "".join(f"{n}|N/A|PENDING|2|0:00|4:00|None|tiny-stage1-train|{site}/{n}\n" for n in (7, 8))
    (site / "bin" / "squeue").write_text(f"#!/bin/bash\nprintf '%s' '{lines}'\n")
    (site / "bin" / "squeue").chmod(0o755)
    assert [job.id for job in commands.queue()] == [7, 8]
    assert [job.id for job in commands.queue(folder=site / "8")] == [8]


def test_what_slurm_says_on_one_line() -> None:
    said = "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid\n"
    assert commands.one_line(said).startswith("invalid partition specified: nope; Batch job submission failed")
    assert commands.one_line("allocation failure: More processors requested than permitted\n") == (
        "allocation failure: More processors requested than permitted"
    )


def test_programs_of_the_model_need_consent(site: Path) -> None:
    add_data(site)
    change(site, "suite.yaml", "code-choice:", "humaneval:")
    code, text = go(dry_run=True)
    assert code == 2 and "humaneval runs programs that the model has written" in text
    change(site, "mine.yaml", "suite: ", "options: [--alow-code], suite: ")
    assert "evaluation.options are not what `smol eval` takes: No such option: --alow-code" in go(dry_run=True)[1]
    change(site, "mine.yaml", "--alow-code", "--allow-code")
    assert go(dry_run=True)[0] == 0


def test_the_code_that_jobs_run_is_named(site: Path) -> None:
    run = create(site)
    now = run.settings["code"]["revision"]
    assert code_text(None).startswith(f"revision {now[:12]}") and "created" not in code_text(run)
    assert ("changes not committed" in code_text(run)) == run.settings["code"]["changed"]
    run.settings["code"]["revision"] = "0" * 40
    assert code_text(run).endswith("; [yellow]the run was created with 000000000000[/]")


def test_a_dry_run_says_where_it_would_go_back_to(site: Path) -> None:
    code, text = go(dry_run=True, stages="stage1", from_step=10)
    assert code == 2 and "a launch would stop here: runs/tiny: there is no run to go back in" in text
    run = create(site)
    append = {"from_step": 0, "to_step": 1, "tokens": {}}
    run.stage_folder("stage1").mkdir()
    append_line(run.stage_folder("stage1") / "ledger.jsonl", append)
    code, text = go(dry_run=True, stages="stage1", from_step=10)
    assert code == 2 and "stage1 has no checkpoint of step 10. Name one of 0." in text
    code, text = go(dry_run=True, stages="stage1", from_step=0, skip_tokens=512)
    assert code == 0 and "goes back to step 0 of stage1 first, and leaves out the next 512 tokens" in text


def test_the_stage_to_go_back_in(site: Path) -> None:
    run = create(site)
    for stage in ("stage1", "stage2"):
        run.stage_folder(stage).mkdir()
        append_line(run.stage_folder(stage) / "ledger.jsonl", {"from_step": 0, "to_step": 1, "tokens": {}})
    assert stage_to_go_back_in(order(), {}, 25) == "stage2"
    assert stage_to_go_back_in(order(), {}, 20) == "stage1"
    assert stage_to_go_back_in(order(stages="stage1"), {}, 23) == "stage1"
    with pytest.raises(UserError, match="job 7 of this run is queued or running"):
        stage_to_go_back_in(order(), {"tiny-stage2-train": [7]}, 25)
    with pytest.raises(UserError, match="no stage has been trained at step 25"):
        stage_to_go_back_in(order(stages="stage3"), {}, 25)


def test_going_back_needs_a_run(site: Path) -> None:
    with pytest.raises(UserError, match="--skip-tokens without --from-step"):
        launch("tiny", "mine.yaml", None, None, True, None, None, Console(quiet=True), skip_tokens=5)


def test_what_the_scripts_ask(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = create(site)
    assert facts(str(run.folder), "stage1", str(site / "suite.yaml"), "1") == ["code-choice", "23"]
    assert main(["facts", str(run.folder), "stage1", str(site / "suite.yaml"), "2"]) == 2
    assert "--array=0-1" in capsys.readouterr().err
    assert "stage2 waits for a person" in next_step(str(run.folder), "stage1")[0]
    assert "last stage" in next_step(str(run.folder), "stage4")[0]
    name, data, out, *words = source("smollm2-1.7b", "out", "/nowhere", "0")
    assert (name, out) == ("fineweb-edu", "out/fineweb-edu") and data == "hf://datasets/HuggingFaceFW/fineweb-edu"
    assert words[:2] == ["--tokenizer", "HuggingFaceTB/cosmo2-tokenizer"] and words[-2:] == ["--glob", "data/*"]
    (site / "downloads" / "fineweb-edu").mkdir(parents=True)
    assert source("smollm2-1.7b", "out", "downloads", "0")[1] == "downloads/fineweb-edu"


def test_jobs_of_a_kill_between_submission_and_note(site: Path) -> None:
    from recipes.files import read_lines
    from recipes.slurm.launch import note_unknown

    run = create(site)
    made = order()
    append_line(run.folder / "jobs.jsonl", {"id": 4, "kind": "train", "stage": "stage1", "name": "tiny-stage1-train"})
    note_unknown(made, {"tiny-stage1-train": [4], "tiny-stage1-eval": [5]})
    assert [(line["id"], line["kind"]) for line in read_lines(run.folder / "jobs.jsonl")] == [(4, "train"), (5, "eval")]
