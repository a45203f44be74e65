from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

CHILD = "import time; from recipes.state import end_with_parent; end_with_parent(); print(flush=True); time.sleep(60)"
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
child.stdout.readline()
print(child.pid, flush=True)
"""


def test_a_process_ends_with_its_parent() -> None:
    out = subprocess.run([sys.executable, "-c", PARENT, CHILD], capture_output=True, text=True, check=True).stdout
    child, until = Path("/proc") / out.strip() / "stat", time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert time.monotonic() < until
