"""A launch that ends in the middle of its submissions, and the next one: the 1.7B's first stage, 12 jobs.

Real: all of it, except the refusal of the fifth job, which stands for a site's limit on jobs in the queue. The
partition is down, so that no job starts.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.files import read_lines
from tests.cluster.lab import Lab
from tests.cluster.runs import Site
from tests.cluster.test_ranks import site_of_the_1_7b

pytestmark = pytest.mark.slow
WORDS = ("smollm2-1.7b", "--run", "cut", "--stages", "stage1")
REFUSING = """#!/bin/bash
case "$*" in *--test-only*) ;; *) echo >> {count}; [ $(wc -l < {count}) -lt 5 ] || {{ echo "sbatch: error: no more" >&2; exit 1; }} ;; esac
exec {sbatch} "$@"
"""  # noqa: E501
WHOLE = {"cut-stage1-train": 10, "cut-stage1-eval": 1, "cut-stage1-propose": 1}


@pytest.fixture(scope="module")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A clone whose profile names a partition that is down."""
    lab.clear()
    site = site_of_the_1_7b(lab, tmp_path_factory.mktemp("cut"))
    with open(site.profile, "a", encoding="utf-8") as file:
        file.write("partition: low\n")
    lab.command("scontrol", "update", "PartitionName=low", "State=DOWN")
    yield site
    lab.command("scontrol", "update", "PartitionName=low", "State=UP")
    lab.clear()


def queued(site: Site) -> Counter[str]:
    return Counter(site.lab.command("squeue", "-h", "-r", "-t", "PENDING", "-o", "%F %j").split("\n")[:-1])


def names(site: Site) -> Counter[str]:
    return Counter(line.split()[1] for line in queued(site))


def words(site: Site) -> list[str]:
    return [*WORDS, "--cluster", str(site.profile), "--data", str(site.data), "--tokenizer", str(site.tokenizer)]


def test_a_stage_without_first_weights_is_refused(site: Site) -> None:
    refused = site.try_smol("launch", *words(site), "--stages", "stage3")
    assert refused.returncode == 2 and "which is neither trained nor queued" in refused.stderr, refused
    assert names(site) == {} and not (site.root / "runs/cut").exists()


def test_a_refusal_in_the_middle_says_what_is_in_the_queue(site: Site, tmp_path: Path) -> None:
    wrapper = tmp_path / "sbatch"
    wrapper.write_text(REFUSING.format(count=tmp_path / "count", sbatch=shutil.which("sbatch")))
    wrapper.chmod(0o755)
    site.more = {"PATH": f"{tmp_path}:{site.lab.environment['PATH']}"}
    refused = site.try_smol("launch", *words(site))
    site.more = {}
    assert refused.returncode == 2 and "no more; jobs " in refused.stderr, refused
    assert "had been submitted. Correct what Slurm names" in refused.stderr and "smol cancel cut" in refused.stderr
    assert names(site) == {"cut-stage1-train": 4}


def test_the_next_launch_submits_the_rest(site: Site) -> None:
    jobs = site.root / "runs/cut/jobs.jsonl"
    os.truncate(jobs, jobs.read_bytes().rstrip().rindex(b"\n") + 1)  # as if killed before the last job's note
    (site.root / "runs/.cut.lock").touch()
    site.smol("launch", *words(site))
    assert names(site) == WHOLE
    assert {line["id"] for line in read_lines(jobs)} == {int(line.split()[0]) for line in queued(site)}
    dependency = site.lab.job(site.run("cut").jobs("eval", "stage1")[0])["Dependency"]
    assert dependency.count("afterok:") == 10


def test_a_run_of_the_same_name_in_another_clone_is_refused(site: Site, tmp_path: Path) -> None:
    for folder in ("stages", "mixtures"):
        shutil.copytree(site.root / folder, tmp_path / folder)
    other = Site(site.lab, tmp_path, site.data, site.tokenizer, site.profile)
    refused = other.try_smol("launch", *words(other))
    assert refused.returncode == 2 and f"another run of this name: {site.root}/runs/cut" in refused.stderr, refused
    assert list((tmp_path / "runs").iterdir()) == [] and names(site) == WHOLE
