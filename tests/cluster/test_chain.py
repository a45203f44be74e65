"""The whole chain on two nodes and four processes: train, evaluate, propose, a person approves, the next stage.

Real: all of it; the recipe is the 1.7B's four stages at a scale at which the first two take seconds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from recipes.data.questions import write_questions
from recipes.files import read_lines
from recipes.loader import load
from tests.cluster.lab import ENDED, ROOT, Lab
from tests.cluster.runs import Live, Site
from tests.cluster.scenario import PATIENCE, Outcome, Story, finished, tell
from tests.conftest import write_source

pytestmark = pytest.mark.slow
RECIPE = """
name: small
extends: smollm2-1.7b
scale: 1/500_000_000
seed: 7
model: {layers: 2, hidden: 64, ffn: 128, heads: 4, kv_heads: 2, vocab_size: 512}
tokenizer: {name: tokenizer.json, vocab_size: 512}
batch: {tokens_per_step: 512, sequence_length: 64, micro_batch: 2}
parallelism: {dp: 4}
checkpoints: {interval: 10, keep_last: 2, keep_every: 0}
block_tokens: 128
branches: []
"""


@pytest.fixture(scope="module")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A clone with a small copy of the 1.7B, tokens for its sources, and questions."""
    root = tmp_path_factory.mktemp("chain")
    for folder in ("stages", "mixtures"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "stages/small").mkdir()
    (root / "stages/small/recipe.yaml").write_text(RECIPE)
    vocabulary = {"<|endoftext|>": 0, **{f"word{i}": i for i in range(1, 512)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="word1"))
    words.add_special_tokens(["<|endoftext|>"])
    words.pre_tokenizer = Whitespace()
    words.save(str(root / "tokenizer.json"))
    sha256 = hashlib.sha256((root / "tokenizer.json").read_bytes()).hexdigest()
    for name in {name for stage in load("small", root).stages for name in stage.mixture.shares}:
        write_source(root / "data" / name, name, sha256)
    write_texts(root / "texts")
    write_questions(root / "texts", root / "questions", seed=7)
    options = ["--data-root", str(root / "questions"), "--limit", "8", "--jobs", "1"]
    evaluation = {"suite": "rehearsal", "gpus": 0, "cpus": 1, "memory": "2G", "time_limit": "10m", "at_once": 2,
                  "options": options}  # fmt: skip
    env = {"POLICY": str(ROOT / "eval/policy-rehearsal.yaml"), "SMOL_UPLOAD": "file:///proc/nowhere"}
    (root / "profile.yaml").write_text(yaml.safe_dump({"extends": "virtual", "env": env, "evaluation": evaluation}))
    (root / "nowhere.yaml").write_text("extends: profile.yaml\npartition: nowhere\n")
    return Site(lab, root, root / "data", root / "tokenizer.json", root / "profile.yaml")


def write_texts(folder: Path) -> None:
    """Held-out documents of three domains that questions can be made from."""
    for domain, line in (("web", "The word{a} of the word{b} is what every word{c} wants."),
                         ("math", "Question: Ann has {a} word{b} and {c} more?\nAnswer:\n{a} + {c} = #### {s}"),
                         ("code", "def word{a}(word{b}, word{c}): return word{b} + word{c} * {s}")):  # fmt: skip
        (folder / domain).mkdir(parents=True)
        count = 1 if domain == "math" else 12
        texts = [
            "\n".join(line.format(a=n + k, b=n + 7, c=2 * k, s=n + 3 * k) for k in range(count)) for n in range(30)
        ]
        pq.write_table(pa.table({"text": texts}), folder / domain / "texts.parquet")


@pytest.fixture(scope="module")
def run(site: Site) -> Live:
    """The run, after the chain has gone through its first two stages."""
    outcome = Outcome()
    tell({"chain": chain(site)}, {"chain": outcome}, at_once=1)
    run = site.run("chain")
    logs = "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in sorted(run.folder.glob("stage*/logs/*.log")))
    assert outcome.error is None, f"{outcome.error}\n{logs}"
    return run


def chain(site: Site) -> Story:
    lab, run = site.lab, site.run("chain")
    refused = site.try_smol("launch", "small", "--cluster", str(site.profile.with_name("nowhere.yaml")))
    assert refused.returncode == 2 and "Name one of the partitions low, main" in refused.stderr, refused
    assert not run.folder.exists() and lab.try_command("squeue", "-h") == ""

    site.launch("small", "chain", "--stages", "stage1..stage2")
    submitted = read_lines(run.folder / "jobs.jsonl")
    yield finished(run, "stage1")
    evaluation, proposing = run.jobs("eval", "stage1"), run.jobs("propose", "stage1")
    for job, what in ((evaluation[0], "stage1 is evaluated"), (proposing[0], "a mixture is proposed")):
        yield lambda job=job: lab.state(job) in ENDED, PATIENCE, what  # type: ignore[misc]
        assert lab.state(job) == "COMPLETED", what
    held = lab.job(run.jobs("train", "stage2")[0])
    assert (held["JobState"], held["Reason"]) == ("PENDING", "JobHeldUser")
    assert "smol approve chain stage2" in site.smol("status", "chain")

    assert "nothing submitted" in site.launch("small", "chain", "--stages", "stage1..stage2")  # a second launch
    assert read_lines(run.folder / "jobs.jsonl") == submitted

    assert "released" in site.smol("approve", "chain", "stage2", "--proposal")
    yield finished(run, "stage2")
    site.smol("cancel", "chain")
    yield lambda: lab.state(run.jobs("eval", "stage2")[0]) == "CANCELLED", 30, "the rest is cancelled"


def test_both_stages_are_trained_to_their_ends(run: Live) -> None:
    plan = json.loads((run.folder / "plan.json").read_text())
    for stage in plan["stages"][:2]:
        assert sorted(run.losses(stage["name"])) == list(range(stage["start_step"] + 1, stage["end_step"] + 1))
        assert run.causes(stage["name"]) == ["finished"]


def test_the_scorecard_has_every_benchmark(run: Live) -> None:
    card = json.loads(next((run.folder / "eval/scores").glob("stage1-*.json")).read_text())
    assert set(card["benchmarks"]) == {"docs-choice", "word-problems", "code-choice"}


def test_an_upload_that_fails_stops_nothing(run: Live) -> None:
    said = (run.folder / "logs/upload.log").read_text()
    assert "stage1 step" in said and "failed, the next pass tries again" in said


def test_the_second_stage_was_trained_on_the_proposal(run: Live) -> None:
    approval = json.loads((run.folder / "approvals/stage2.json").read_text())
    assert (approval["proposal"], approval["overridden"]) == (approval["hash"], False)
    assert (run.folder / approval["mixture"]).read_bytes() == (run.folder / "proposals/stage2.yaml").read_bytes()
    gates = run.events("gate", "stage2")
    assert [gate["hash"] for gate in gates] == [approval["hash"]]


def test_the_data_seen_is_the_data_planned(run: Live) -> None:
    run.lab.command(sys.executable, "-m", "recipes.cli", "audit", str(run.folder), "--digests", timeout=120)


def test_no_job_is_left(run: Live) -> None:
    assert run.lab.try_command("squeue", "-h", "-t", "PENDING,RUNNING").split() == []
