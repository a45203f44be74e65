from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.run import Run
from recipes.slurm import preflight
from recipes.slurm.preflight import earlier, gpus, judge, judge_reduce, parse_devices, parse_xids, report
from recipes.slurm.profile import Cluster, load_cluster
from recipes.state import read_state

NODES = ["n1", "n2", "n3", "n4"]
GB = 10**9
H100 = "0, NVIDIA H100 80GB HBM3, 81559, 4, 0, 550.54.15\n1, NVIDIA H100 80GB HBM3, 81559, 4, 0, 550.54.15\n"
CLUSTER = load_cluster("virtual").model_copy(update={"gpus_per_node": 2})


def facts(node: str, **changed: Any) -> dict[str, Any]:
    good = {
        "node": node, "time": 1000.0, "gpus": {"count": 2, "devices": parse_devices(H100), "remapped": ["0, 0"]},
        "xid": [], "free": {"run": 900 * GB, "tmp": 50 * GB}, "versions": {"python": "3.12.1", "torch": "2.8"},
        "code": "abc", "sees": NODES,
    }  # fmt: skip
    return {**good, **changed}


def judged(cluster: Cluster | None = CLUSTER, **changed: dict[str, Any]) -> dict[str, str]:
    """What the judge says of four nodes of which n2 differs as `changed` says."""
    return judge(NODES, {n: facts(n, **(changed if n == "n2" else {})) for n in NODES}, cluster, 24 * GB)


def devices(**changed: Any) -> dict[str, Any]:
    first, second = parse_devices(H100)
    return {"count": 2, "devices": [first, {**second, **changed}]}


def test_fit_nodes() -> None:
    assert judged() == {}
    assert judged(None) == {}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"gpus": {"count": 1}}, "1 GPUs, the profile says 2"),
        ({"gpus": devices(ecc=3)}, "GPU 1: 3 uncorrected ECC errors"),
        ({"gpus": devices(used_mib=40000)}, "GPU 1: 40000 MiB of memory in use already"),
        ({"gpus": devices(total_mib=40000)}, "GPUs of different memory"),
        ({"gpus": devices(driver="570.1")}, "driver"),
        ({"gpus": {"count": 2, "devices": parse_devices(H100.replace("81559", "40960"))}}, "of 40960 MiB"),
        ({"gpus": {**devices(), "remapped": ["0, 0", "1, 0"]}}, "remapped"),
        ({"gpus": {"count": 0, "error": "Unable to determine the device handle\nmore"}}, "nvidia-smi: Unable"),
        ({"xid": ["Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."]}, "fallen off the bus"),
        ({"free": {"run": 900 * GB, "tmp": GB}}, "1.0 GB free for temporary files"),
        ({"free": {"run": 23 * GB, "tmp": 9 * GB}}, "23.0 GB free where checkpoints go"),
        ({"time": 1100.0}, "its clock is +100 s off"),
        ({"time": 900.0}, "its clock is -100 s off"),
        ({"versions": {"python": "3.12.1", "torch": "2.7"}}, "torch 2.7, the others have 2.8"),
        ({"code": "xyz"}, "its code differs"),
        ({"sees": ["n2"]}, "it does not see the files of n1, n3, n4"),
    ],
)  # fmt: skip
def test_a_bad_node_is_named_with_its_reason(changed: dict[str, Any], reason: str) -> None:
    bad = judged(**changed)
    assert list(bad) == ["n2"] and reason in bad["n2"]


def test_a_silent_node_is_bad_and_the_others_are_not() -> None:
    seen = ["n1", "n2", "n4"]
    bad = judge(NODES, {n: facts(n, sees=seen) for n in seen}, CLUSTER, GB)
    assert list(bad) == ["n3"] and "no report" in bad["n3"]


def test_a_node_that_only_the_judge_sees_is_bad_and_the_others_are_not() -> None:
    hidden = {n: facts(n, sees=NODES if n == "n2" else ["n1", "n3", "n4"]) for n in NODES}
    assert judge(NODES, hidden, CLUSTER, GB) == {"n2": "n1, n3, n4 do not see its files"}


def test_of_two_nodes_the_one_that_does_not_see_is_bad() -> None:
    two = {"n1": facts("n1", sees=["n1"]), "n2": facts("n2", sees=["n1", "n2"])}
    assert judge(["n1", "n2"], two, CLUSTER, GB) == {"n1": "it does not see the files of n2"}


def test_what_nvidia_smi_prints() -> None:
    first, second = parse_devices(H100)
    assert first["total_mib"] == 81559 and first["ecc"] == 0 and second["index"] == "1"
    assert parse_devices("0, NVIDIA A10, 23028, 1, [N/A], 550.54.15")[0]["ecc"] is None
    assert parse_devices("") == [] == parse_devices("No devices were found")


def test_recent_hardware_errors_of_the_kernels_log() -> None:
    log = """[    5.000000] NVRM: loading NVIDIA UNIX x86_64 Kernel Module
[   10.100000] NVRM: Xid (PCI:0000:1b:00): 79, GPU has fallen off the bus.
[ 9000.000000] NVRM: Xid (PCI:0000:3b:00): 31, pid=1, name=python, MMU Fault
[ 9500.500000] NVRM: Xid (PCI:0000:3b:00): 74, pid='<unknown>', NVLink: fatal error detected
"""
    assert parse_xids(log, 9600) == ["Xid (PCI:0000:3b:00): 74, pid='<unknown>', NVLink: fatal error detected"]
    assert len(parse_xids(log, 100)) == 2 and parse_xids("", 100) == []


def test_where_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, count in (("0,1,2", 3), ("", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert gpus(CLUSTER) == {"count": count}
    assert gpus(CLUSTER.model_copy(update={"gpu_check": "none"})) == {"count": None}
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpus(None) == {"count": None}
    missing = gpus(CLUSTER.model_copy(update={"gpu_check": "nvidia-smi"}))
    assert missing["count"] == 0 and "nvidia-smi" in missing["error"]


def test_bad_nodes_of_earlier_starts_stay_excluded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, other = (tmp_path / name for name in ("17.0", "17.1", "170.0"))
    for folder in (first, second, other):
        folder.mkdir()
    assert report({"n2": "cold"}, first) == 3
    assert report({"n9": "cold"}, other) == 3
    assert earlier(second) == {"n2"}
    assert report({"n4": "hot", "n1": "hot"}, second) == 3
    assert (second / "bad").read_text() == "n1,n2,n4\n"
    assert capsys.readouterr().out.splitlines()[-1] == "BAD n1 n4"
    assert report({}, second) == 0


def test_an_all_reduce_that_some_never_joined(tmp_path: Path) -> None:
    for node, mark in (("n1", {"ranks": 4}), ("n3", {"ranks": 4})):
        (tmp_path / f"{node}.reduce").write_text(json.dumps(mark))
    bad, line = judge_reduce(["n1", "n2", "n3"], tmp_path)
    assert list(bad) == ["n2"] and "failed" in line
    (tmp_path / "n2.reduce").write_text(json.dumps({"ranks": 4}))
    bad, line = judge_reduce(["n1", "n2", "n3"], tmp_path)
    assert bad == {} and "no node can be named" in line
    for node in ("n1", "n2", "n3"):
        (tmp_path / f"{node}.reduce").write_text(json.dumps({"ranks": 4, "bytes": 4096, "seconds": 0.002}))
    assert judge_reduce(["n1", "n2", "n3"], tmp_path) == ({}, "all-reduce of 4,096 bytes over 4 ranks: 2.0 ms")


def call(run: Run, look: Path, *words: str, node: str = "n1", nodes: int = 2) -> subprocess.Popen[str]:
    environment = {**os.environ, "LOOK": str(look), "SLURMD_NODENAME": node, "SLURM_JOB_NUM_NODES": str(nodes)}
    command = [sys.executable, "-m", "recipes.slurm.preflight", words[0], str(run.folder), "stage1", *words[1:]]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_two_nodes_look_and_are_judged(tiny_run: Run, tmp_path: Path) -> None:
    look = tmp_path / "5.0"
    looks = [call(tiny_run, look, "look", node=node) for node in ("n1", "n2")]
    assert [process.communicate()[0] for process in looks] == ["", ""]
    assert [process.returncode for process in looks] == [0, 0]
    assert json.loads((look / "n2.json").read_text())["sees"] == ["n1", "n2"]
    judge = call(tiny_run, look, "judge", "n1", "n2")
    assert judge.communicate()[0] == "preflight: 2 of 2 nodes are fit\n" and judge.returncode == 0
    judge = call(tiny_run, look, "judge", "n1", "n2", "n3")
    assert judge.communicate()[0].splitlines()[-1] == "BAD n3" and judge.returncode == 3
    assert (look / "bad").read_text() == "n3\n"


def test_a_full_shared_disk_names_no_node(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for node in ("n1", "n2"):
        full = facts(node, free={"run": 0, "tmp": 50 * GB}, sees=["n1", "n2"])
        (tmp_path / f"{node}.json").write_text(json.dumps(full))
    monkeypatch.setenv("LOOK", str(tmp_path))
    assert preflight.main(["judge", str(tiny_run.folder), "stage1", "n1", "n2"]) == 1
    assert "make room" in capsys.readouterr().out and not (tmp_path / "bad").exists()
    state = read_state(tiny_run, "stage1")
    assert state["exit_code"] == 74 and "0.0 GB free where checkpoints go" in state["reason"]


@pytest.mark.slow
@pytest.mark.slow
def test_the_all_reduce_sums_over_all_ranks(tiny_run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "recipes.slurm.preflight", "reduce", str(tiny_run.folder), "stage1"]
    environment = {**os.environ, "LOOK": str(tmp_path), "SLURMD_NODENAME": "n1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    bad, line = judge_reduce(["n1"], tmp_path)
    assert bad == {} and "over 2 ranks" in line
