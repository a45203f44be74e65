"""Before training: is every node fit? slurm/train.slurm runs it; it takes seconds.

    srun python -m recipes.slurm.preflight look RUN STAGE           on every node: writes what it finds into $LOOK
    python -m recipes.slurm.preflight judge RUN STAGE NODE…         on one: 0 fine, 3 bad nodes, named on the last line
    torchrun … -m recipes.slurm.preflight reduce RUN STAGE          on every GPU: an all-reduce
    python -m recipes.slurm.preflight judge RUN STAGE NODE… --reduced   on one: which nodes did not get through it

$LOOK is runs/<run>/preflight/<job>.<restart>/, on the file system that all nodes share. A node writes <node>.json and
waits until it sees the others' files; the judge names the bad nodes in `bad`, separated by commas, together with those
of the job's earlier starts. Exit code 1: something is wrong, and no node can be named. torch is imported by `reduce`
only: on a cold file system its import takes longer than all the rest.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from recipes.errors import UserError
from recipes.files import write_atomic, write_json
from recipes.run import Run
from recipes.slurm.profile import Cluster, load_frozen
from recipes.state import EXIT_NOT_WRITTEN, last_saved, write_state

BAD_NODES = 3
SEE_SECONDS = 30
"""For which a node waits for the others' files. Chosen: network file systems keep a folder's listing for up to 30 s."""
CLOCK_SECONDS = 60
"""From the median clock. Chosen: the nodes start within a few seconds, and what compares times allows minutes."""
TMP_BYTES = 2 * 10**9
"""Free in the folder of temporary files. Chosen: compiled kernels and sockets need less."""
USED_MIB = 2048
"""Of a GPU's memory before training. Chosen: a driver takes some hundred MiB, a process left over takes gigabytes."""
HARDWARE_XIDS = {48, 64, 74, 79, 95, 119, 120}
"""Uncorrectable ECC, row remapping failed, NVLink, fallen off the bus, uncontained ECC, GSP: NVIDIA's Xid catalogue
asks for a reset or a repair. Others, such as 13, 31 and 43, are mostly the program's."""
XID_SECONDS = 3600
"""How far back they count. Chosen: after a repair the kernel's log still holds them."""
PACKAGES = ("torch", "nanotron", "numpy", "transformers", "flash-attn", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
SILENT = "no report: Python did not start, a tool such as nvidia-smi hangs, or it cannot write to the run's folder"
QUERY = "index,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total,driver_version"
ROWS = "remapped_rows.pending,remapped_rows.failure"
REDUCE_BYTES = 64 << 20
REDUCE_TIMES = 5
Facts = dict[str, Any]


# On every node


def look(run: Path, folder: Path) -> Facts:
    """What this node finds; written for the judge, and again once the others' files are seen."""
    cluster = load_frozen(run)
    node = this_node()
    facts: Facts = {
        "node": node, "time": time.time(), "gpus": gpus(cluster), "xid": recent_xids(),
        "free": {"run": shutil.disk_usage(run).free, "tmp": shutil.disk_usage(temporary()).free},
        "versions": versions(), "code": code_hash(),
    }  # fmt: skip
    write_json(folder / f"{node}.json", facts)
    facts["sees"] = wait_for_others(folder, int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))
    write_json(folder / f"{node}.json", facts)
    return facts


def this_node() -> str:
    """This node's name in Slurm."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def temporary() -> str:
    """The folder of temporary files."""
    return os.environ.get("TMPDIR", "/tmp")


def wait_for_others(folder: Path, count: int) -> list[str]:
    """The nodes whose files are seen here, waiting at most `SEE_SECONDS` for all of them."""
    end = time.monotonic() + SEE_SECONDS
    while len(seen := sorted(path.stem for path in folder.glob("*.json"))) < count and time.monotonic() < end:
        time.sleep(0.2)
    return seen


def gpus(cluster: Cluster | None) -> Facts:
    """The node's GPUs as the profile says they are counted: `count`, and with nvidia-smi a list of `devices`."""
    how = cluster.gpu_check if cluster else "nvidia-smi" if shutil.which("nvidia-smi") else "none"
    if how == "none":
        return {"count": None}
    if how == "slurm":
        return {"count": len([name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name])}
    listed, error = output(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"])
    rows, _ = output(["nvidia-smi", f"--query-remapped-rows={ROWS}", "--format=csv,noheader"])
    devices = parse_devices(listed)
    return {"count": len(devices), "devices": devices, "remapped": rows.split("\n"), "error": error}


def output(command: Sequence[str]) -> tuple[str, str | None]:
    """What a tool prints, and the error if it is missing, hangs or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return done.stdout.strip(), (done.stderr or done.stdout).strip() if done.returncode else None


def parse_devices(text: str) -> list[Facts]:
    """nvidia-smi's table; ECC is none where the GPU has none."""
    devices = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) == len(QUERY.split(",")):
            index, name, total, used, ecc, driver = row
            amounts = {"total_mib": total, "used_mib": used, "ecc": ecc}
            figures = {key: int(value) if value.isdecimal() else None for key, value in amounts.items()}
            devices.append({"index": index, "name": name, **figures, "driver": driver})
    return devices


def recent_xids() -> list[str]:
    """The kernel's reports of broken GPUs within `XID_SECONDS`; none where its log may not be read."""
    log, _ = output(["dmesg"])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return parse_xids(log, uptime)


def parse_xids(log: str, uptime: float) -> list[str]:
    """Lines like `[ 99.5] NVRM: Xid (PCI:0000:3b:00): 79, …` of faulty hardware; the stamps are seconds of uptime."""
    found = re.findall(r"^\[ *([0-9.]+)\] NVRM: (Xid \(.*?\): ([0-9]+).*)$", log, re.MULTILINE)
    recent = [(text, int(code)) for stamp, text, code in found if uptime - float(stamp) <= XID_SECONDS]
    return [text for text, code in recent if code in HARDWARE_XIDS]


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that training depends on."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def code_hash() -> str:
    """xxh3-128 of this package's files: the same code, wherever it is installed."""
    here = Path(__file__).resolve().parents[1]
    digest = xxhash.xxh3_128()
    for path in sorted(here.rglob("*.py")):
        digest.update(f"{path.relative_to(here)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


# On one node


def judge(nodes: Sequence[str], facts: dict[str, Facts], cluster: Cluster | None, checkpoint: int) -> dict[str, str]:
    """The bad nodes, each with its first reason.

    Args:
        nodes: all of the job.
        facts: what each has written, by node; a node without is bad.
        checkpoint: bytes that one takes.
    """
    known = [facts[node] for node in nodes if node in facts]
    bad = dict.fromkeys(nodes, SILENT)
    clock = statistics.median(f["time"] for f in known) if known else 0.0
    most: dict[str, Any] = {key: _most([f[key] for f in known]) for key in ("versions", "code")}
    hardware = _most([_hardware(f) for f in known])
    for found in known:
        others = [f["node"] for f in known if f["node"] not in found.get("sees", ())]
        blind = [f["node"] for f in known if found["node"] not in f.get("sees", ())]
        checks = [
            *_gpu_problems(found["gpus"], cluster),
            *found["xid"],
            _hardware(found) != hardware and f"{_hardware(found)}, the others have {hardware}",
            _differing(found["versions"], most["versions"]),
            found["code"] != most["code"] and "its code differs from the other nodes'",
            abs(found["time"] - clock) > CLOCK_SECONDS and f"its clock is {found['time'] - clock:+.0f} s off",
            found["free"]["tmp"] < TMP_BYTES and f"{found['free']['tmp'] / 1e9:.1f} GB free for temporary files",
            found["free"]["run"] < checkpoint and f"{found['free']['run'] / 1e9:.1f} GB free where checkpoints go, "
            f"one takes {checkpoint / 1e9:.1f}",
            2 * len(others) >= len(known) and f"it does not see the files of {', '.join(others[:3])}",
            2 * len(blind) >= len(known) > 2 and f"{', '.join(blind[:3])} do not see its files",
        ]  # fmt: skip
        first = next((text for text in checks if text), None)
        bad[found["node"]] = str(first or "")
    return {node: reason for node, reason in bad.items() if reason}


def _gpu_problems(found: Facts, cluster: Cluster | None) -> list[str]:
    problems = [f"nvidia-smi: {found['error'].splitlines()[0]}"] if found.get("error") else []
    if cluster and found["count"] is not None and found["count"] != cluster.gpus_per_node:
        problems.append(f"{found['count']} GPUs, the profile says {cluster.gpus_per_node}")
    devices = found.get("devices", [])
    sizes = {device["total_mib"] for device in devices}
    problems += [f"GPUs of different memory: {sorted(map(str, sizes))} MiB"] if len(sizes) > 1 else []
    for device in devices:
        name = f"GPU {device['index']}"
        problems += [f"{name}: {device['ecc']} uncorrected ECC errors"] if device["ecc"] else []
        used = device["used_mib"] or 0
        problems += [f"{name}: {used} MiB of memory in use already"] if used > USED_MIB else []
    rows = [row for row in found.get("remapped", ()) if re.search(r"[1-9]|[Yy]es", row)]
    return problems + (["rows of GPU memory wait to be remapped, or could not be"] if rows else [])


def _hardware(found: Facts) -> str:
    """A node's kinds of GPUs and drivers, in words."""
    devices = found["gpus"].get("devices", ())
    kinds = {f"{one['name']} of {one['total_mib']} MiB with driver {one['driver']}" for one in devices}
    return " and ".join(sorted(kinds)) or "no GPUs"


def _most(values: Sequence[Any]) -> Any:
    """The value that most nodes have."""
    counts = Counter(json.dumps(value, sort_keys=True) for value in values)
    return json.loads(counts.most_common(1)[0][0]) if counts else None


def _differing(mine: dict[str, str], most: dict[str, str]) -> str:
    return ", ".join(f"{name} {mine[name]}, the others have {most[name]}" for name in mine if mine[name] != most[name])


def judge_reduce(nodes: Sequence[str], folder: Path) -> tuple[dict[str, str], str]:
    """The nodes that did not get as far as the others in the all-reduce, and a line on how it went."""
    marks = {node: _mark(folder / f"{node}.reduce") for node in nodes}
    if all("seconds" in mark for mark in marks.values()):
        slowest, one = max(mark["seconds"] for mark in marks.values()), marks[nodes[0]]
        return {}, f"all-reduce of {one['bytes']:,} bytes over {one['ranks']} ranks: {slowest * 1e3:.1f} ms"
    started = {node for node, mark in marks.items() if mark}
    behind = {node for node in nodes if node not in started} if started else set()
    bad = dict.fromkeys(behind, "its processes did not get to the all-reduce")
    return bad, "the all-reduce failed; the log says more" + ("" if bad else ", and no node can be named")


def _mark(path: Path) -> Facts:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def earlier(folder: Path) -> set[str]:
    """The bad nodes that earlier starts of the same job have named."""
    job = folder.name.partition(".")[0]
    texts = [path.read_text(encoding="utf-8") for path in folder.parent.glob(f"{job}.*/bad")]
    return {node for text in texts for node in text.strip().split(",") if node}


def report(bad: dict[str, str], folder: Path) -> int:
    """Prints and notes the bad nodes; returns the exit code."""
    if not bad:
        return 0
    for node, reason in bad.items():
        print(f"{node}: {reason}")
    write_json(folder / "reasons", bad)
    write_atomic(folder / "bad", ",".join(sorted(set(bad) | earlier(folder))) + "\n")
    print(f"BAD {' '.join(sorted(bad))}", flush=True)
    return BAD_NODES


# On every GPU


def reduce(folder: Path) -> None:
    """Sums a tensor over all ranks and checks the sum; each node's first rank writes how long it took.

    Raises:
        AssertionError: a wrong sum.
    """
    from datetime import timedelta

    import torch
    from torch import distributed

    rank, ranks, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")

    def note(mark: Facts) -> None:
        if local == 0:
            write_json(folder / f"{this_node()}.reduce", mark)

    if cuda:
        torch.cuda.set_device(device)
    note({"ranks": ranks})
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=90))
    tensor = torch.full((REDUCE_BYTES // 4 if cuda else 1024,), float(rank), device=device)
    wanted, seconds = ranks * (ranks - 1) / 2, []
    for _ in range(REDUCE_TIMES):
        copy, began = tensor.clone(), time.perf_counter()
        distributed.all_reduce(copy)
        lowest, highest = copy.min().item(), copy.max().item()
        seconds.append(time.perf_counter() - began)
        assert lowest == highest == wanted, f"rank {rank} got {lowest} to {highest} where the sum is {wanted}"
    note({"ranks": ranks, "bytes": tensor.nbytes, "seconds": statistics.median(seconds)})
    distributed.destroy_process_group()


def main(arguments: Sequence[str]) -> int:
    """Does what the first word says; see the top of this file."""
    what, run, stage, *rest = arguments
    folder = Path(os.environ["LOOK"])
    if what == "look":
        look(Path(run), folder)
    elif what == "reduce":
        reduce(folder)
    else:
        return _judge(Path(run), stage, [node for node in rest if node != "--reduced"], folder, "--reduced" in rest)
    return 0


def _unnamed(folder: Path, stage: str, reason: str, code: int) -> int:
    """Says what is wrong where no node can be named, also to recipes/slurm/restart.py; returns the exit code."""
    print(reason)
    run = Run.load(folder)
    write_state(run, stage, "failed", last_saved(run, run.plan.stage(stage)), code, reason)
    return 1


def _judge(run: Path, stage: str, nodes: list[str], folder: Path, reduced: bool) -> int:
    if reduced:
        bad, line = judge_reduce(nodes, folder)
        print(line)
        if line.startswith("the all-reduce failed") and not bad:
            return _unnamed(run, stage, line, 1)
        return report(bad, folder)
    facts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    bad = judge(nodes, facts, load_frozen(run), plan["checkpoint_bytes"])
    if facts and all("GB free where checkpoints go" in bad.get(node, "") for node in nodes):
        full = f"{next(iter(bad.values()))}: make room, then launch again"  # the shared disk is full, no node is bad
        return _unnamed(run, stage, full, EXIT_NOT_WRITTEN)
    print(f"preflight: {len(nodes) - len(bad)} of {len(nodes)} nodes are fit")
    return report(bad, folder)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
