"""The 256 GPUs of the 1.7B: the project's script and profile on 32 nodes.

Real: the profile h100-32x8 (without nvidia-smi, and without preflight's all-reduce), `smol launch`, sbatch,
slurm/train.slurm, preflight's look at 32 nodes, 32 torchrun agents and their rendezvous. In the trainer's place, every
one of the 256 workers is a shell script that writes down what torchrun and Slurm have told it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.loader import load
from tests.cluster.lab import ROOT, RUNNING, Lab
from tests.cluster.runs import Site
from tests.cluster.scenario import PATIENCE
from tests.conftest import write_source

pytestmark = pytest.mark.slow
NODES, GPUS = 32, 8
PROFILE = """
extends: h100-32x8
gpu_check: slurm      # there is no nvidia-smi
all_reduce: false     # 256 processes that import torch
evaluation: {options: [--allow-code]}   # nothing is evaluated here
"""
SAID = (
    "RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES SLURM_NODEID"
)
WORKER = f"""#!/bin/bash
# In Python's place: torchrun starts `$PYTHON_EXEC -u -m recipes.train RUN STAGE`.
for name in {SAID} SLURMD_NODENAME; do echo "$name=${{!name}}"; done > "$RANKS/$RANK.partial"
echo "arguments=$*" >> "$RANKS/$RANK.partial"
mv "$RANKS/$RANK.partial" "$RANKS/$RANK"
exec sleep 600
"""


@pytest.fixture(scope="module")
def ranks(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, dict[str, str]]]:
    """What each of the 256 workers was told, by rank."""
    lab.clear()
    root = tmp_path_factory.mktemp("clone")
    site = site_of_the_1_7b(lab, root)
    (root / "ranks").mkdir()
    (root / "worker").write_text(WORKER)
    (root / "worker").chmod(0o755)
    site.more = {"PYTHON_EXEC": str(root / "worker"), "RANKS": str(root / "ranks")}
    site.launch("smollm2-1.7b", "full", "--stages", "stage1")
    run = site.run("full")
    job = run.jobs("train", "stage1")[0]
    lab.wait(job, RUNNING, 30)
    started = (root / "ranks").glob
    run.until(lambda: len(list(started("*[0-9]"))) == NODES * GPUS, PATIENCE, "not all ranks have started")
    assert len(lab.hosts(job)) == NODES
    yield {int(path.name): said(path) for path in (root / "ranks").iterdir()}
    lab.clear()


def site_of_the_1_7b(lab: Lab, root: Path) -> Site:
    """A clone with a few tokens of the 1.7B's sources."""
    for folder in ("stages", "mixtures"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "profile.yaml").write_text(PROFILE)
    tokenizer = root / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"vocab": {f"t{i}": i for i in range(512)}}, "added_tokens": []}))
    sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    for name in load("smollm2-1.7b", root).stages[0].mixture.shares:
        write_source(root / "data" / name, name, sha256)
    return Site(lab, root, root / "data", tokenizer, root / "profile.yaml")


def said(path: Path) -> dict[str, str]:
    """A worker's file."""
    return dict(line.partition("=")[::2] for line in path.read_text().splitlines())


def test_every_rank_is_its_nodes_number_times_8_and_its_own(ranks: dict[int, dict[str, str]]) -> None:
    assert sorted(ranks) == list(range(NODES * GPUS))
    for rank, told in ranks.items():
        node, local = divmod(rank, GPUS)
        assert (told["RANK"], told["LOCAL_RANK"]) == (str(rank), str(local))
        assert (told["SLURM_NODEID"], told["GROUP_RANK"]) == (str(node), str(node))
        assert (told["WORLD_SIZE"], told["LOCAL_WORLD_SIZE"]) == ("256", "8")


def test_every_node_has_eight_ranks_and_every_rank_a_device_of_its_own(ranks: dict[int, dict[str, str]]) -> None:
    devices = {(told["SLURMD_NODENAME"], told["CUDA_VISIBLE_DEVICES"].split(",")[int(told["LOCAL_RANK"])])
               for told in ranks.values()}  # fmt: skip
    assert devices == {(f"node{node:02d}", str(gpu)) for node in range(1, 33) for gpu in range(8)}


def test_all_ranks_meet_in_one_place(ranks: dict[int, dict[str, str]]) -> None:
    assert {told["MASTER_ADDR"] for told in ranks.values()} == {"node01"}
    assert len({told["MASTER_PORT"] for told in ranks.values()}) == 1


def test_every_worker_is_the_trainer_of_this_run(ranks: dict[int, dict[str, str]]) -> None:
    assert len({told["arguments"] for told in ranks.values()}) == 1
    assert ranks[0]["arguments"].startswith("-u -m recipes.train /")
    assert ranks[0]["arguments"].endswith("runs/full stage1")
