"""The inside of eval/sandbox.py, started with `python -I`: shuts itself in and runs the program. No import of ours."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys

CANNOT, TIMEOUT = 3, 124
"""Exit codes: this machine offers no way to shut a program in; the time was up."""
FILE_BYTES = 1 << 20
"""Of stdout and of stderr at most."""
OPEN_FILES = 64
_NEWUSER = 0x10000000
_NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000
"""Mounts, IPC, processes, network (linux/sched.h)."""
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_CALLS = {
    "x86_64": (0xC000003E, (29, 41, 56, 57, 58, 425, 435)),
    "aarch64": (0xC00000B7, (194, 198, 220, 425, 435)),
}
"""By machine: its number in seccomp's data, and those of shmget, socket, clone, fork, vfork, io_uring_setup, clone3."""
_LANDLOCK_WRITES = (1 << 1) + sum(1 << bit for bit in range(4, 13))
"""Writing files; removing and making anything (linux/landlock.h, version 1)."""
_LANDLOCK_LATER = {2: 1 << 13, 3: 1 << 14}
"""By version: moving a file to another folder, truncating one."""


def main(folder: str, seconds: float, memory: int) -> int:
    """Shuts this process in and lets a child run the program.

    Returns:
        0 if the program ended by itself and without an error, else 1, `TIMEOUT` or `CANNOT`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    told, tell = os.pipe()  # closed by a successful exec
    try:
        isolate(libc)
        child = os.fork()
    except OSError as error:
        print(error, file=sys.stderr)
        return CANNOT
    if child == 0:
        become(libc, folder, seconds, memory, tell)
    os.close(tell)
    if failed := os.read(told, 1000):
        print(failed.decode(), file=sys.stderr)
        return CANNOT
    return wait(child, seconds)


def become(libc: ctypes.CDLL, folder: str, seconds: float, memory: int, tell: int) -> None:
    """Turns this process into the program; what keeps it from that goes to the file descriptor `tell`."""
    try:
        if not read_only(libc) and not forbid_writes(libc):
            raise OSError("no read-only mounts, and no Landlock")
        drop_capabilities(libc)
        limit(seconds, memory)
        forbid_calls(libc)
        environment = {"HOME": folder, "OMP_NUM_THREADS": "1"}  # no thread can be started
        os.execve(sys.executable, [sys.executable, "-I", "-B", f"{folder}/program.py"], environment)
    except OSError as error:
        os.write(tell, str(error).encode())
    os._exit(CANNOT)


def isolate(libc: ctypes.CDLL) -> None:
    """Takes the network and others' processes away: its child is the first of a PID namespace, and sees no other.

    Raises:
        OSError: not allowed here.
    """
    if libc.unshare(_NAMESPACES) and libc.unshare(_NEWUSER | _NAMESPACES):
        raise OSError(ctypes.get_errno(), "no namespaces")


def read_only(libc: ctypes.CDLL) -> bool:
    """Makes every mount read-only, for this process alone (mount_setattr, Linux 5.12); False where that is refused."""
    only_read, private, recursive, here = 1, 1 << 18, 0x8000, -100
    attributes = struct.pack("4Q", only_read, 0, private, 0)
    return not libc.syscall(442, here, b"/", recursive, attributes, len(attributes))


def forbid_writes(libc: ctypes.CDLL) -> bool:
    """Landlock: no writing, making or removing. False where the kernel has none.

    Modes and times of the user's own files can still be changed, and before Linux 6.2 files be emptied.
    """
    create, restrict = 444, 446
    version = libc.syscall(create, None, 0, 1)
    handled = _LANDLOCK_WRITES | sum(bit for least, bit in _LANDLOCK_LATER.items() if version >= least)
    ruleset = libc.syscall(create, struct.pack("Q", handled), 8, 0) if version > 0 else -1
    return ruleset >= 0 and not (_no_new_privileges(libc) or libc.syscall(restrict, ruleset, 0))


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Without them root cannot undo what was done, set the clock, or reach other processes.

    Raises:
        OSError: refused.
    """
    version = 0x20080522
    if _no_new_privileges(libc) or libc.capset(struct.pack("Ii", version, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


def forbid_calls(libc: ctypes.CDLL) -> None:
    """seccomp: no sockets, not even local ones, and no second process, so that the limits hold for everything.

    Raises:
        OSError: refused, or no list of system calls for this machine.
    """
    machine = os.uname().machine
    if machine not in _CALLS:
        raise OSError(f"system calls of {machine} are unknown")
    number, calls = _CALLS[machine]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    kill, allow, refuse, x32 = 0x80000000, 0x7FFF0000, 0x00050001, 0x40000000
    tests = [(equal, call) for call in calls] + [(at_least, x32)]
    code = [(load, 0, 0, 4), (equal, 1, 0, number), (end, 0, 0, kill), (load, 0, 0, 0)]
    code += [(test, len(tests) - i, 0, value) for i, (test, value) in enumerate(tests)]
    code += [(end, 0, 0, allow), (end, 0, 0, refuse)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = struct.pack("HP", len(code), ctypes.addressof(text))
    if libc.prctl(_SECCOMP, _FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp")


def _no_new_privileges(libc: ctypes.CDLL) -> int:
    return int(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))


def limit(seconds: float, memory: int) -> None:
    """Limits this process."""
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def wait(child: int, seconds: float) -> int:
    """Waits for the child: 0 or 1 by its exit code, or `TIMEOUT`."""

    def stop(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os._exit(TIMEOUT)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, status = os.waitpid(child, 0)
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
