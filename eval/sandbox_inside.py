"""The inside of eval/sandbox.py, started with `python -I`: shuts itself in and runs the program. No import of ours."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys

FILE_BYTES = 1 << 20
OPEN_FILES = 64
PROCESSES = 64
NOBODY = 65534
_NEWUSER, _NEWNET, _NEWIPC, _NEWPID = 0x10000000, 0x40000000, 0x08000000, 0x20000000
_LANDLOCK_WRITES = sum(1 << bit for bit in (1, *range(4, 13)))
"""Writing files; removing and making anything (linux/landlock.h, ABI 1)."""


def main(folder: str, seconds: float, memory: int) -> int:
    """Shuts this process in and lets a child run the program; returns the exit code, 3 if it cannot be shut in."""
    libc = ctypes.CDLL(None, use_errno=True)
    root = os.geteuid() == 0
    try:
        isolate(libc, root)
        child = os.fork()
        if child == 0 and not forbid_writes(libc, folder):
            become_nobody(root)
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(3)
    if child == 0:
        limit(seconds, memory)
        os.execve(sys.executable, [sys.executable, "-I", "-B", f"{folder}/program.py"], {"HOME": folder})
    return wait(child, seconds)


def isolate(libc: ctypes.CDLL, root: bool) -> None:
    """Takes the network away, and gives the child a PID namespace whose end takes everything in it along.

    Raises:
        OSError: not allowed here.
    """
    user = 0 if root else _NEWUSER
    if libc.unshare(user | _NEWNET | _NEWIPC | _NEWPID) and libc.unshare(user | _NEWNET):
        raise OSError(ctypes.get_errno(), "no network namespace")


def forbid_writes(libc: ctypes.CDLL, folder: str) -> bool:
    """Landlock: no writing, making or removing but below `folder`; False where the kernel has none."""
    create, add_rule, restrict, no_new_privileges = 444, 445, 446, 38
    ruleset = libc.syscall(create, struct.pack("Q", _LANDLOCK_WRITES), 8, 0)
    if ruleset < 0:
        return False
    for path in (folder, "/dev/null"):
        allowed = _LANDLOCK_WRITES if path == folder else 1 << 1
        rule = struct.pack("=Qi", allowed, os.open(path, os.O_PATH))
        if libc.syscall(add_rule, ruleset, 1, rule, 0):
            return False
    return not libc.prctl(no_new_privileges, 1, 0, 0, 0) and not libc.syscall(restrict, ruleset, 0)


def become_nobody(root: bool) -> None:
    """What takes Landlock's place where there is none.

    Raises:
        OSError: this process is not root.
    """
    if not root:
        raise OSError("the kernel has no Landlock, and only root can become nobody")
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def limit(seconds: float, memory: int) -> None:
    """Limits this process and what it starts."""
    whole = int(seconds) + 1
    limits = {
        resource.RLIMIT_CPU: whole, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_NPROC: PROCESSES, resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def wait(child: int, seconds: float) -> int:
    """Waits for the child; its exit code, or 124 when the time is up."""

    def stop(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os._exit(124)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
