"""Runs eval.worker several times in one process, because importing lighteval takes longer than a tiny evaluation.

python -m tests.eval.run_workers FILE      FILE: a JSON list of argument lists; prints a JSON list of exit codes

In the place of a worker, `cp A B` copies a folder, `definitions OUT` writes how each benchmark is asked, and
`read CASES OUT` what the metrics say to texts that a model might have written.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

from eval.worker import main


def definitions(out: str) -> None:
    """Tokens at most, what ends an answer, and the metrics, by benchmark."""
    from eval.tasks import DEFINITIONS

    found = {n: [tokens, stops, [m.metric_name for m in metrics]] for n, (_, metrics, tokens, stops) in
             DEFINITIONS.items()}  # fmt: skip
    Path(out).write_text(json.dumps(found))


def read(cases: str, out: str) -> None:
    """Each case: a benchmark, a row of its dataset, and a text or its choices' nats; writes what the metrics say."""
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import SamplingMethod

    from eval.tasks import DEFINITIONS

    os.environ["EVAL_ALLOW_CODE"] = "1"
    found = []
    for name, row, said in json.loads(Path(cases).read_text()):
        prompt, metrics, _, _ = DEFINITIONS[name]
        wrote = isinstance(said, str)
        response = (
            ModelResponse(text=[said]) if wrote else ModelResponse(logprobs=said, output_tokens=[[0]] * len(said))
        )
        kind = SamplingMethod.GENERATIVE if wrote else SamplingMethod.LOGPROBS
        found.append({m.metric_name: m.sample_level_fn.compute(doc=prompt(row, name), model_response=response)
                      for m in metrics if m.category == kind})  # fmt: skip
    Path(out).write_text(json.dumps(found))


def run(arguments: list[str]) -> int:
    """One worker, or what stands in its place."""
    if arguments[0] == "cp":
        shutil.copytree(arguments[1], arguments[2], dirs_exist_ok=True)
        return 0
    if arguments[0] in ("definitions", "read"):
        {"definitions": definitions, "read": read}[arguments[0]](*arguments[1:])
        return 0
    try:
        return main(arguments)
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    print(json.dumps([run(arguments) for arguments in json.loads(Path(sys.argv[1]).read_text())]))
