"""What goes wrong on a cluster, done to a real run of two nodes and four processes, in the middle of its stage.

Real: Slurm, its signals and requeueing, `smol launch`, slurm/train.slurm with its preflight, torchrun, and Nanotron's
trainer on CPUs. Of each run, the loss of every step and the ledger are compared with an undisturbed run's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml

from recipes.data.interleave import IntArray
from recipes.data.manifest import Manifest
from recipes.data.stream import SourceStream
from recipes.lint import checked_plan
from recipes.loader import load
from recipes.plan import Plan
from tests.cluster.lab import Lab
from tests.cluster.runs import Live, Site
from tests.cluster.scenario import PATIENCE, Fault, Outcome, Story, finished, tell
from tests.engine.tiny_run import VOCAB, make_run, write_source

pytestmark = pytest.mark.slow
STEPS = 240
STAGE = "stage1"
RECIPE = {
    "parallelism": {"dp": 4}, "batch": {"micro_batch": 2}, "checkpoints": {"interval": 10},
    "schedule": {"decay_start_step": 2 * STEPS, "decay_steps": 10}, "guard": {"hang_seconds": 20},
}  # fmt: skip
PROFILE = {
    "extends": "virtual", "all_reduce": False, "signal_seconds": 60,
    "evaluation": {"suite": "rehearsal", "gpus": 0, "cpus": 1, "memory": "2G", "time_limit": "10m", "at_once": 2},
}  # fmt: skip
SPOILT = range(26, 34)
"""Steps of which the data is noise."""
SPOILT_RECIPE = {
    "name": "spoilt", "extends": "tiny", "block_tokens": 1024, "stages": [STAGE], "parallelism": {"dp": 2},
    "batch": {"micro_batch": 4}, "checkpoints": {"interval": 5}, "guard": {"window": 12, "patience": 3},
}  # fmt: skip
DISK = 24 << 20


@pytest.fixture(scope="session")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A clone with the tiny recipe and its data, and profiles of both partitions."""
    made = tmp_path_factory.mktemp("tiny")
    make_run(made, RECIPE, stage1={"end_step": STEPS}, stage2={"end_step": STEPS + 20, "micro_batch": 1})
    for name, over in (("main", {}), ("low", {"partition": "low", "signal_seconds": 110})):
        (made / f"{name}.yaml").write_text(yaml.safe_dump(PROFILE | over))
    return Site(lab, made / "tree", made / "run/data", made / "tree/made-with.json", made / "main.yaml")


@pytest.fixture(scope="session")
def outcomes(site: Site) -> dict[str, Outcome]:
    """All stories, told side by side."""
    tellers = {"undisturbed": undisturbed, "nodes": nodes, "ranks": ranks, "partition": partition, "stops": stops,
               "spoilt": spoilt}  # fmt: skip
    if only := os.environ.get("STORIES"):
        tellers = {name: teller for name, teller in tellers.items() if name in only.split(",")}
    found = {name: Outcome() for name in tellers}
    tell({name: teller(site, found[name]) for name, teller in tellers.items()}, found, at_once=4)
    seconds = {fault: times for outcome in found.values() for fault, times in outcome.seconds.items()}
    site.lab.clear()
    (site.lab.folder / "seconds.json").write_text(json.dumps(seconds, indent=2))
    for fault, (noted, over) in seconds.items():
        print(f"{fault}: noted after {noted:.0f} s, past it after {over:.0f} s")
    return found


# Stories


def undisturbed(site: Site, outcome: Outcome) -> Story:
    run = yield from site.train("undisturbed", STAGE)
    yield finished(run, STAGE)


def nodes(site: Site, outcome: Outcome) -> Story:
    """The controller restarts, an administrator sets a node down, and another node loses its power."""
    lab = site.lab
    run = yield from site.train("nodes", STAGE)
    job = run.jobs("train", STAGE)[0]
    fault = Fault(run, STAGE, "slurmctld restarted", outcome)
    yield fault.later()
    lab.stop_controller()
    step = run.step(STAGE)
    lab.until(lambda: run.step(STAGE) > step + 5, 60, "no steps without slurmctld")  # nobody may ask Slurm meanwhile
    began = time.monotonic()
    lab.start_controller()
    outcome.seconds[fault.name] = (0.0, time.monotonic() - began)
    yield fault.later()
    assert (len(run.events("start", STAGE)), run.causes(STAGE)) == (1, [])

    fault = Fault(run, STAGE, "node down", outcome)
    lab.node_down(down := lab.hosts(job)[1])
    yield from fault.survive("node-failure")
    assert down not in lab.hosts(job)
    lab.node_up(down)

    fault = Fault(run, STAGE, "node killed", outcome)
    yield fault.later()
    lab.kill_node(killed := lab.hosts(job)[1])
    yield from fault.survive("node-failure")
    assert killed not in lab.hosts(job)
    lab.start_node(killed)
    yield finished(run, STAGE)


def ranks(site: Site, outcome: Outcome) -> Story:
    """A rank is killed, another hangs, and the newest checkpoint is damaged while the job waits."""
    run = yield from site.train("ranks", STAGE)
    fault = Fault(run, STAGE, "rank killed", outcome)
    yield fault.later()
    os.kill(worker(run, 1), signal.SIGKILL)
    yield from fault.survive("crash")

    fault = Fault(run, STAGE, "rank hangs", outcome)
    yield fault.later()
    os.kill(worker(run, 0), signal.SIGSTOP)
    story = fault.survive("hang")
    yield next(story)
    stacks = list((run.folder / STAGE / "logs").glob("stacks-*.txt"))
    assert stacks and all("recipes/engine/trainer.py" in path.read_text() for path in stacks)
    newest = max((run.folder / STAGE / "checkpoints").glob("*[0-9]"), key=lambda path: int(path.name))
    damage(newest)
    yield from story
    assert (newest.parent / f"{newest.name}.damaged").is_dir()
    assert f"after {newest.parent / str(int(newest.name) - 10)};" in run.log(STAGE)
    yield finished(run, STAGE)


def partition(site: Site, outcome: Outcome) -> Story:
    """A job of a higher partition takes the nodes, and the time limit comes."""
    lab = site.lab
    slow = {"RECIPES_TEST_FAULT": "slow:seconds=0.4"}  # Slurm looks at time limits only every half minute
    low = replace(site, profile=site.profile.with_name("low.yaml"), more=slow)
    run = yield from low.train("partition", STAGE)
    job = run.jobs("train", STAGE)[0]

    fault = Fault(run, STAGE, "preemption", outcome)
    yield fault.later()
    where = lab.job(job)["NodeList"]
    other = lab.submit(
        "-p", "main", "-N2", f"--nodelist={where}", "--exclusive", "--output=/dev/null", "--wrap", "sleep 5"
    )
    yield from fault.survive("preempted")
    assert lab.state(other) == "COMPLETED"

    fault = Fault(run, STAGE, "time limit", outcome)
    yield fault.later()
    hours, minutes, _ = map(int, lab.job(job)["RunTime"].split(":"))
    limit = 60 * hours + minutes + 2  # in one or two minutes; the job asked for the signal 110 s before
    lab.command("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    story = fault.survive("time-limit")
    yield next(story)
    change = ["scontrol", "update", f"JobId={job}", "TimeLimit=20"]
    yield lambda: lab.run(change, 20, None).returncode == 0, 30, "the time limit is put back"
    yield from story
    yield finished(run, STAGE)


def stops(site: Site, outcome: Outcome) -> Story:
    """The disk of the checkpoints fills up, and later a rank writes NaN: both stop training, for a person to go on."""
    lab = site.lab
    run = yield from site.train("stops", STAGE)
    folder = run.folder / STAGE / "checkpoints"
    folder.mkdir(exist_ok=True)
    lab.mount_small(folder, DISK)
    yield Fault(run, STAGE, "disk full", outcome).later(25)
    ballast = lab.seen(folder) / "ballast"
    with pytest.raises(OSError), open(ballast, "wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    yield from stopped(run, outcome, "disk full", "disk-full")
    assert run.state(STAGE)["exit_code"] == 74 and "free" in run.state(STAGE)["reason"], run.state(STAGE)
    ballast.unlink()

    before = run.state(STAGE)["step"]
    nan = before + 15
    run = yield from replace(site, more={"RECIPES_TEST_FAULT": f"nan:step={nan}:rank=1"}).train("stops", STAGE)
    yield lambda: run.step(STAGE) == nan - 1, PATIENCE, "the step before NaN"
    yield from stopped(run, outcome, "NaN", "diverged")
    state, good = run.state(STAGE), before + 10
    assert (state["state"], state["step"]) == ("diverged", good)
    assert f"step {nan}" in state["reason"] and state["reason"].endswith(f"checkpoints/{good}"), state
    yield from site.train("stops", STAGE, "--from-step", str(good))
    yield finished(run, STAGE)


def stopped(run: Live, outcome: Outcome, name: str, cause: str) -> Story:
    """From a fault that was just done, or is about to come: its cause is written down, and the job ends for good."""
    began, ends = time.monotonic(), len(run.causes(STAGE))
    yield lambda: run.causes(STAGE)[ends:] == [cause], PATIENCE, f"{name} is recorded"
    outcome.seconds[name] = (time.monotonic() - began, 0.0)
    job = run.jobs("train", STAGE)[-1]
    yield lambda: run.lab.state(job) == "FAILED", 20, "the job has failed"


def spoilt(site: Site, outcome: Outcome) -> Story:
    """A node with a full disk of its own, and a span of data on which the loss jumps up and stays."""
    lab, bad = site.lab, "node30"
    there = spoil(site)
    lab.in_mounts_of(bad, "mount", "-t", "tmpfs", "-o", "size=1M", "small", scratch := str(there.root / "scratch"))
    run = yield from there.train("spoilt", STAGE, recipe="spoilt")
    job = run.jobs("train", STAGE)[0]
    yield lambda: bool(run.events("start", STAGE)), PATIENCE, "the first start"
    fault = Fault(run, STAGE, "bad node", outcome)
    yield from fault.survive("bad-node")
    assert run.events("end", STAGE)[0]["detail"] == f"{bad}: 0.0 GB free for temporary files"
    assert lab.hosts(job) == ["node31", "node32"]  # the profile's exclusions stay

    yield lambda: run.step(STAGE) >= SPOILT.start - 1, PATIENCE, "the step before the spike"
    yield from stopped(run, outcome, "loss spike", "diverged")
    good = SPOILT.start - 1
    assert run.state(STAGE)["reason"].endswith(f"checkpoints/{good}"), run.state(STAGE)
    lab.in_mounts_of(bad, "umount", scratch)
    tokens = str(len(SPOILT) * 256)
    yield from there.train("spoilt", STAGE, "--from-step", str(good), "--skip-tokens", tokens, recipe="spoilt")
    yield finished(run, STAGE)
    assert max(loss for step, loss in run.losses(STAGE).items() if step > good) < 4
    assert "left out on purpose" in there.smol("audit", "spoilt", "--digests")
    assert "1 × bad-node" in (said := there.smol("status", "spoilt")) and "1 × diverged" in said


def spoil(site: Site) -> Site:
    """The same clone with a recipe and a profile for two processes, and data of which the steps `SPOILT` are noise."""
    recipe = site.root / "stages/spoilt"
    recipe.mkdir()
    (recipe / "recipe.yaml").write_text(yaml.safe_dump(SPOILT_RECIPE))
    (recipe / "stage1.yaml").write_text("end_step: 60\n")
    shutil.copytree(site.root / "mixtures/tiny", site.root / "mixtures/spoilt")
    data, plan = site.root / "spoilt-data", checked_plan(load("spoilt", site.root))
    for use in plan.stages[0].sources:
        write_source(data / use.name, use.name, site.tokenizer, 12 * plan.block_tokens)
        a_step = plan.tokens_per_step * Fraction(use.share)
        places = np.arange(int(a_step * (SPOILT.start - 1)), int(a_step * (SPOILT.stop - 1)))
        make_noise(Manifest.load(data / use.name), plan, places)
    (site.root / "scratch").mkdir()
    only = {"gpus_per_node": 1, "exclude": "node[01-29]", "scratch": str(site.root / "scratch")}
    (profile := site.profile.with_name("spoilt.yaml")).write_text(yaml.safe_dump(PROFILE | only))
    return replace(site, data=data, profile=profile)


def make_noise(manifest: Manifest, plan: Plan, offsets: IntArray) -> None:
    """Puts random tokens into a source's file, in the places of its stream."""
    path = manifest.folder / "00000.ds"
    ids = np.fromfile(path, dtype="<u2")
    places = SourceStream(manifest, plan.seed, plan.block_tokens).locate(offsets)[1]
    ids[places] = np.random.default_rng(1).integers(0, VOCAB, len(places))
    ids.tofile(path)
    Manifest.of_files(
        manifest.folder, [path.name], source=manifest.source, tokenizer_sha256=manifest.tokenizer_sha256,
        vocab_size=VOCAB, end_of_text_id=0, token_bytes=2, config={},
    ).save()  # fmt: skip


def worker(run: Live, node: int) -> int:
    """The process of a rank of the run's current job, on its first or second node."""
    host = run.lab.hosts(run.jobs("train", STAGE)[-1])[node]
    return run.lab.pids(host, f"-u -m recipes.train {run.folder} {STAGE}")[-1]


def damage(checkpoint: Path) -> None:
    """Flips a byte in the middle of a checkpoint's largest file."""
    file = max(checkpoint.rglob("*.*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# What came of them


@pytest.mark.parametrize("story", ["undisturbed", "nodes", "ranks", "partition", "stops", "spoilt"])
def test_it_went_as_documented(story: str, outcomes: dict[str, Outcome], site: Site) -> None:
    if story not in outcomes:
        pytest.skip("the variable STORIES leaves it out")
    error = outcomes[story].error
    assert error is None, f"{error}\n{site.run(story).log(STAGE)}"


@pytest.mark.parametrize("story", ["nodes", "ranks", "partition", "stops"])
def test_every_loss_and_the_ledger_are_the_undisturbed_runs(
    story: str, outcomes: dict[str, Outcome], site: Site
) -> None:
    if story not in outcomes:
        pytest.skip("the variable STORIES leaves it out")
    assert outcomes[story].error is None, "see the test above"
    run, reference = site.run(story), site.run("undisturbed")
    assert sorted(reference.losses(STAGE)) == list(range(1, STEPS + 1))
    assert run.losses(STAGE) == reference.losses(STAGE)
    assert run.ledger(STAGE) == reference.ledger(STAGE)
