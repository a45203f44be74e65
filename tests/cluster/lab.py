"""A real Slurm on this one machine: munge, slurmctld, and a slurmd a node, each node in namespaces of its own.

Every daemon is a child of this process and dies with it, however it dies (setpriv --pdeathsig); a node takes all that
runs on it along (a PID namespace). State, keys, sockets and logs are in one folder; the machine's own /etc/hosts, host
name and mounts stay as they are. It needs root, for the namespaces and for device files that stand for GPUs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "unshare", "nsenter", "setpriv")
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
RUNNING = {"RUNNING"}
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "TIMEOUT"}
SLURM_CONF = """
ClusterName=virtual
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its old credential to expire; the default is 120 s.
AuthInfo=socket={lab}/run/munge.sock,cred_expire=5
PlugStackConfig=/dev/null
MailProg=/bin/true
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool/%n
SlurmctldPidFile={lab}/run/slurmctld.pid
SlurmdPidFile={lab}/run/%n.pid
SlurmctldLogFile={lab}/log/slurmctld.log
SlurmdLogFile={lab}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
# Accounting needs a database; gres/gpu there without one ends slurmctld.
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
# Less than 120 drains the other nodes of a job whose node is killed.
UnkillableStepTimeout=120
MinJobAge=3600
# A node that was killed comes back when it boots; one that an administrator has set down does not.
ReturnToService=1
JobRequeue=1
EnforcePartLimits=ALL
TreeWidth=64
NodeName={range} NodeHostname={range} NodeAddr=127.0.0.1 Port=[{first}-{last}] Sockets=2 CoresPerSocket={cores} \
ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:h100:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=20000 PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE DefMemPerCPU=20000 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
"""
"""`main` preempts `low`."""


class Unavailable(Exception):
    """There can be no virtual cluster on this machine; the text says why."""


def check() -> None:
    """Raises Unavailable if Slurm is not installed, or this process may not make namespaces and devices."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        raise Unavailable(f"{', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge)")
    tried = subprocess.run(
        ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "none", "/mnt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tried.returncode:
        raise Unavailable(f"no namespaces here, or not root: {tried.stderr.strip()}")


class Lab:
    """The cluster; a context manager that leaves nothing running."""

    def __init__(self, folder: Path, nodes: int = 32, cpus: int = 96, gpus: int = 8) -> None:
        """`cpus` and `gpus` are a node's; `folder` is empty, and short enough for a socket's path (108 bytes)."""
        self.folder, self.gpus = folder, gpus
        self.nodes = [f"node{i:02d}" for i in range(1, nodes + 1)]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        python = str(Path(sys.executable).parent)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "OMP_"))},
            "PATH": f"{python}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "PYTHONPATH": str(ROOT), "SLURM_CONF": str(folder / "etc/slurm.conf"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        """Of every command and job: threads fix the order of additions, so that losses can be compared."""
        self.write_files(cpus)

    def __enter__(self) -> Lab:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Up and down

    def write_files(self, cpus: int) -> None:
        """Configuration, host names, keys and devices."""
        for name in ("etc", "run", "log", "dev", "state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        ports, count = free_ports(len(self.nodes) + 1), len(self.nodes)
        values = {"lab": self.folder, "port": ports[0], "first": ports[1], "last": ports[-1],
                  "range": f"node[01-{count:02d}]", "cores": cpus // 2, "gpus": self.gpus}  # fmt: skip
        (self.folder / "etc/slurm.conf").write_text(SLURM_CONF.format(**values))
        devices = f"{self.folder}/dev/nvidia[0-{self.gpus - 1}]"
        gres = f"NodeName=node[01-{count:02d}] Name=gpu Type=h100 File={devices}\n"
        (self.folder / "etc/gres.conf").write_text(gres)
        hosts = ["127.0.0.1 localhost ctl", *(f"127.0.10.{i} {name}" for i, name in enumerate(self.nodes, 1))]
        (self.folder / "etc/hosts").write_text("\n".join(hosts) + "\n")
        key = self.folder / "etc/munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for number in range(self.gpus):  # the null device by another name: Slurm wants a character device
            os.mknod(self.folder / f"dev/nvidia{number}", 0o20666, os.makedev(1, 3))

    def start(self) -> None:
        """Starts everything; returns when all nodes are idle.

        Raises:
            TimeoutError: something does not come up; the logs are in the folder.
        """
        run, etc, log = self.folder / "run", self.folder / "etc", self.folder / "log"
        self.spawn(
            "munged", "munged", "--foreground", "--force", f"--key-file={etc}/munge.key", f"--socket={run}/munge.sock",
            f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log", f"--seed-file={run}/munged.seed",
        )  # fmt: skip
        # Mounts made here are seen by all nodes, and by nothing else on the machine.
        shared = "mount --make-rshared / && touch run/shared && exec sleep infinity"
        self.spawn("mounts", "unshare", "--mount", "--propagation", "private", "sh", "-c", shared)
        self.until(lambda: (run / "munge.sock").exists() and (run / "shared").exists(), 10, "munged does not start")
        self.start_controller()
        for name in self.nodes:
            self.start_node(name)
        self.until(lambda: len(self.in_state("idle")) == len(self.nodes), 60, "the nodes do not get idle")

    def stop(self) -> None:
        """Ends everything that was started: nodes with all their jobs first, munge last."""
        for name in reversed(list(self.daemons)):
            self.kill_daemon(name)

    def kill_daemon(self, name: str) -> None:
        """SIGKILL, for one that this process has started."""
        process = self.daemons.pop(name)
        process.kill()
        process.wait()

    def spawn(self, name: str, *command: str) -> None:
        """Starts a daemon, which must stay in the foreground."""
        with open(self.folder / f"log/{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [*DIES_WITH_US, *command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, start_new_session=True,
            )  # fmt: skip

    def start_controller(self) -> None:
        """Starts slurmctld on a host named ctl; returns when it answers."""
        script = 'hostname ctl && mount --bind "$0" /etc/hosts && exec slurmctld -D'
        hosts = str(self.folder / "etc/hosts")
        self.spawn("slurmctld", "unshare", "--uts", "--mount", "--propagation", "slave", "sh", "-c", script, hosts)
        self.until(lambda: "is UP" in self.try_command("scontrol", "ping"), 20, "slurmctld does not answer")

    def stop_controller(self) -> None:
        """Kills slurmctld; jobs go on."""
        self.kill_daemon("slurmctld")

    # Nodes

    def start_node(self, name: str) -> None:
        """Boots a node; one that was down comes back by itself."""
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        script = 'hostname "$0"; mount --bind "$1" /etc/hosts; slurmd -D -N "$0" & wait $!'
        space = ("--uts", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child", "--mount-proc")
        node = ("unshare", *space, "bash", "-c", script, name, str(self.folder / "etc/hosts"))
        self.spawn(name, *self.there(*node))

    def kill_node(self, name: str) -> None:
        """Cuts its power: everything on it dies at once."""
        self.kill_daemon(name)

    def node_down(self, name: str) -> None:
        """As an administrator: its jobs are requeued at once, slurmd goes on."""
        self.command("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

    def node_up(self, name: str) -> None:
        """Back into service."""
        self.command("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def in_state(self, state: str) -> list[str]:
        """The nodes in a state of sinfo's."""
        return self.try_command("sinfo", "-h", "-N", "-p", "main", "-t", state, "-o", "%N").split()

    def mount_small(self, folder: Path, size: int) -> None:
        """Mounts a disk of `size` bytes on a folder, as all nodes see it; again: changes its size."""
        fresh = f" {folder} " not in self.in_mounts("cat", "/proc/self/mounts")
        options = f"size={size}" if fresh else f"remount,size={size}"
        self.in_mounts("mount", "-t", "tmpfs", "-o", options, "small", str(folder))

    def in_mounts_of(self, node: str, *command: str) -> str:
        """Runs a command that sees one node's mounts."""
        return self.command("nsenter", f"--mount=/proc/{self.pids(node, 'slurmd -D')[-1]}/ns/mnt", "--", *command)

    def in_mounts(self, *command: str) -> str:
        """Runs a command that sees the mounts that the nodes see."""
        return self.command(*self.there(*command))

    def there(self, *command: str) -> list[str]:
        """A command that sees the mounts that the nodes see; it starts in /."""
        return ["nsenter", f"--mount=/proc/{self.daemons['mounts'].pid}/ns/mnt", "--", *command]

    def seen(self, folder: Path) -> Path:
        """A folder as the nodes see it."""
        return Path(f"/proc/{self.daemons['mounts'].pid}/root") / folder.relative_to("/")

    def pids(self, node: str, words: str) -> list[int]:
        """Processes on a node, lowest first, whose command line holds `words`; ids are this machine's."""
        found, known = [], [self.daemons[node].pid]
        while known:
            pid = known.pop()
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found += [pid] if words in line else []
                for task in Path(f"/proc/{pid}/task").iterdir():
                    known += [int(child) for child in (task / "children").read_text().split()]
        return sorted(found)

    # Jobs

    def submit(self, *words: str) -> int:
        """sbatch; returns the job's id."""
        return int(self.command("sbatch", "--parsable", *words).split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What scontrol says of a job: JobState, NodeList, Restarts, Reason, …; nothing if it does not answer."""
        words = self.try_command("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def state(self, job: int) -> str:
        """Such as PENDING or RUNNING; empty if the controller does not answer."""
        return self.job(job).get("JobState", "")

    def hosts(self, job: int) -> list[str]:
        """A job's nodes."""
        return self.command("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def wait(self, job: int, states: set[str], seconds: float) -> str:
        """Waits for one of the states; returns it.

        Raises:
            TimeoutError: it does not come.
        """
        self.until(lambda: self.state(job) in states, seconds, f"job {job} is not {' or '.join(states)}", 0.5)
        return self.state(job)

    def clear(self) -> None:
        """Ends all jobs and waits until all nodes are idle; killed ones are booted."""
        self.command("scancel", "--me")
        for name in self.nodes:
            if name not in self.daemons:
                self.start_node(name)
        self.try_command("scontrol", "update", f"NodeName={','.join(self.nodes)}", "State=RESUME")
        self.until(lambda: len(self.in_state("idle")) == len(self.nodes), 120, "the nodes do not get idle")

    # Commands

    def command(self, *command: str, timeout: float = 30, cwd: Path | None = None) -> str:
        """What a command prints.

        Raises:
            AssertionError: it fails.
        """
        done = self.run(command, timeout, cwd)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_command(self, *command: str) -> str:
        """What a command prints, if it works."""
        try:
            return self.run(command, 20, None).stdout
        except subprocess.TimeoutExpired:
            return ""

    def run(self, command: Sequence[str], timeout: float, cwd: Path | None) -> subprocess.CompletedProcess[str]:
        """Runs a command in the cluster's environment."""
        return subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
        )

    def until(self, condition: Callable[[], bool], seconds: float, otherwise: str, every: float = 0.1) -> None:
        """Waits for a condition.

        Raises:
            TimeoutError: `otherwise`, and the end of the controller's log.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                log = self.folder / "log/slurmctld.log"
                tail = "\n".join(log.read_text().splitlines()[-12:]) if log.is_file() else ""
                raise TimeoutError(f"{otherwise} after {seconds:g} s\n{tail}")
            time.sleep(every)


def free_ports(count: int) -> list[int]:
    """Ports in a row that nobody listens on."""
    for first in range(21000, 30000, count + 7):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise Unavailable("no free ports")
