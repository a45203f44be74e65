"""The rehearsal's benchmarks, made from held-out text: multiple choice, word problems, the next line of code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from recipes.data.corpus import iter_texts
from recipes.files import write_atomic

ITEMS = 200
"""Of each benchmark, if the text gives so many: a standard error of about 3 points at 25 %."""
CHOICES = 4
CONTEXT = 300
"""Characters that a continuation is chosen for, about 90 tokens."""
SHORTEST, LONGEST = 25, 90
"""Characters of a continuation."""

Continuation = tuple[str, str]
"""A context, and what really follows."""


def write_questions(heldout: Path, out: Path, seed: int) -> dict[str, int]:
    """Writes docs-choice, word-problems and code-choice below `out`, in the columns that eval/benchmarks.py reads.

    Args:
        heldout: folder of the held-out corpora, `<heldout>/<domain>/`; a domain that is absent gives no benchmark.

    Returns:
        Items by benchmark.
    """
    makers: dict[str, tuple[str, Callable[[Sequence[str], Random], list[dict[str, Any]]]]] = {
        "docs-choice": ("web", lambda texts, random: _choices(texts, _sentences, random)),
        "word-problems": ("math", lambda texts, random: list(_problems(texts))[:ITEMS]),
        "code-choice": ("code", lambda texts, random: _choices(texts, _lines, random)),
    }
    counts = {}
    for name, (domain, make) in makers.items():
        if (heldout / domain).is_dir():
            rows = make(list(iter_texts(heldout / domain)), Random(f"{seed} {name}"))
            write_atomic(out / name / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            counts[name] = len(rows)
    return counts


def _choices(
    texts: Sequence[str], cut: Callable[[str, Random], Continuation | None], random: Random
) -> list[dict[str, Any]]:
    """What follows, among continuations of other documents; long documents are cut in several places."""
    times = -(-ITEMS // max(1, len(texts)))
    cuts = {(n, found): None for _ in range(times) for n, text in enumerate(texts) if (found := cut(text, random))}
    rows = []
    for document, (context, right) in list(cuts)[:ITEMS]:
        others = sorted({wrong for n, (_, wrong) in cuts if n != document and wrong != right})
        choices = [right, *random.sample(others, CHOICES - 1)]
        random.shuffle(choices)
        rows.append({"context": context, "choices": choices, "label": choices.index(right)})
    return rows


def _sentences(text: str, random: Random) -> Continuation | None:
    """A sentence of prose cut between two words."""
    plain = re.sub(r"\s+", " ", text).strip()
    ends = [m.end() for m in re.finditer(r"\w{3,} ", plain) if 80 <= m.end() <= len(plain) - LONGEST]
    for place in random.sample(ends, min(10, len(ends))):
        rest = re.match(rf"[^.!?:]{{{SHORTEST},{LONGEST}}}(?=[.!?:])", plain[place:])
        if rest:
            return plain[max(0, place - CONTEXT) : place - 1], rest[0]
    return None


def _lines(text: str, random: Random) -> Continuation | None:
    """A line of code that follows some others."""
    lines = text.splitlines(keepends=True)
    fit = [n for n, line in enumerate(lines) if n >= 4 and SHORTEST <= len(line.rstrip()) <= LONGEST
           and not line.lstrip().startswith(("#", '"'))]  # fmt: skip
    if not fit:
        return None
    n = random.choice(fit)
    return "".join(lines[:n])[-CONTEXT:], lines[n].rstrip()


def _problems(texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Questions and worked answers, in GSM8K's columns."""
    for text in texts:
        if match := re.fullmatch(r"Question: (.*?)\nAnswer:\n(.*)", text, re.DOTALL):
            yield {"question": match[1], "answer": match[2]}
