"""Runs eval.worker several times in one process, because importing lighteval takes longer than a tiny evaluation.

python -m tests.eval.run_workers FILE      FILE: a JSON list of argument lists; prints a JSON list of exit codes
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path

from eval.worker import main


def run(arguments: list[str]) -> int:
    """One worker; `cp A B` in its place copies a folder."""
    if arguments[0] == "cp":
        shutil.copytree(arguments[1], arguments[2], dirs_exist_ok=True)
        return 0
    try:
        return main(arguments)
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    print(json.dumps([run(arguments) for arguments in json.loads(Path(sys.argv[1]).read_text())]))
