"""The rehearsal's corpora: text that any machine with Python has, in the Hub's parquet layout.

Web text is what packages say about themselves in prose, code is their source files, math their formulas and generated
problems, synthetic text generated lessons. Nothing is imported or run; the same seed and environment give the same
bytes. Every document is used once, in one source or held out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import pydoc_data.topics
import re
import shutil
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.data.lessons import lessons, word_problems
from recipes.files import PARTIAL, sync_folder, write_json

DONE = "corpora.json"
FILES_PER_SOURCE = 2
SMALLEST, LARGEST = 400, 200_000
"""Bytes of the Python files that are looked at."""
SHORTEST_PROSE = 250
LONGEST_DOCUMENT = 6_000
"""Characters; what is longer is cut, except in the books, so that many texts share a small corpus."""
LONG_DOCUMENT = 8_000
"""Characters of a document for sources of long ones."""
NEAR = 160
"""Two documents whose first so many normalised characters agree count as one."""

_FORMULA = re.compile(r":math:|\\frac|\\sum|\\int|\\sqrt|\^\{?[0-9a-z]|[a-z]\*\*[0-9a-z]|\b[a-z]\([a-z]\) ?=")
_TEACHING = re.compile(
    r"\b(because|therefore|for example|for instance|such as|means that|in other words|note that|is called|defined as|"
    r"allows|consists of|which is|that is|used to|in order to|if the|when the)\b"
)


@dataclass(frozen=True)
class Kind:
    """How a source's documents are chosen."""

    pools: tuple[str, ...]
    """Of prose, code, formulas, problems, lessons and books; one part of each, all of the same size."""
    column: str = "text"
    best: bool = False
    """Only what the educational-style score, or for code the share of documentation, finds good."""


WEB_MATH = ("formulas", "problems")
KINDS = {
    "fineweb-edu": Kind(("prose",), best=True), "dclm": Kind(("prose",)), "dclm-edu": Kind(("prose",), best=True),
    "fineweb-edu-long": Kind(("books",), best=True), "dclm-long": Kind(("books",)), "dolma-books": Kind(("books",)),
    "starcoderdata": Kind(("code",), "content"), "stack-edu": Kind(("code",), "content", best=True),
    "infimm-webmath": Kind(WEB_MATH, "text_list"),
    "finemath-3plus": Kind(("problems",)), "finemath-4plus": Kind(("problems",)), "auggsm8k": Kind(("problems",)),
}  # fmt: skip
DEFAULTS = {"web": Kind(("prose",)), "code": Kind(("code",)), "math": Kind(WEB_MATH), "synthetic": Kind(("lessons",))}
MINED = ("prose", "code", "formulas", "books")


def kind_of(name: str, kinds: Mapping[str, str]) -> Kind:
    """What a source, or `heldout/<domain>`, is made of: its own kind, or its domain's."""
    domain = name.removeprefix("heldout/") if name.startswith("heldout/") else kinds[name]
    return KINDS.get(name, DEFAULTS.get(domain, DEFAULTS["web"]))


def build_corpora(
    out: Path, sizes: Mapping[str, int], heldout: Mapping[str, int], seed: int, kinds: Mapping[str, str],
    progress: Callable[[int], object] = lambda characters: None,
) -> dict[str, int]:  # fmt: skip
    """Writes a folder of parquet files for each source, and one below heldout/ for each domain.

    Args:
        sizes: characters wanted by source.
        heldout: characters wanted by domain.
        kinds: domain by source.
        progress: told the characters gathered since it was told last.

    Returns:
        Characters written by source, `heldout/<domain>` included: fewer than wanted where the environment has no more.
    """
    wanted = {**{f"heldout/{d}": n for d, n in heldout.items()}, **sizes}
    arguments = {"sizes": dict(sizes), "heldout": dict(heldout), "seed": seed}
    if (done := _done(out, arguments)) is not None:
        return done
    shutil.rmtree(out, ignore_errors=True)
    gathered = _gather(wanted, seed, kinds, progress)
    for name, documents in gathered.items():
        _write(out / name, documents, kind_of(name, kinds))
    counts = {name: sum(map(len, documents)) for name, documents in gathered.items()}
    write_json(out / DONE, {"arguments": arguments, "characters": counts})
    return counts


def iter_texts(folder: Path) -> Iterator[str]:
    """The documents of a folder of parquet files that `build_corpora` wrote, in order."""
    for path in sorted(folder.rglob("*.parquet")):
        table = pq.read_table(path)
        column = next(name for name in ("text", "content", "text_list") if name in table.column_names)
        for value in table.column(column).to_pylist():
            yield "\n".join(part for part in value if part) if isinstance(value, list) else value


def _done(out: Path, arguments: dict[str, Any]) -> dict[str, int] | None:
    """The counts of an earlier, complete build with the same arguments."""
    if not (out / DONE).is_file():
        return None
    content = json.loads((out / DONE).read_text(encoding="utf-8"))
    counts: dict[str, int] = content["characters"]
    return counts if content["arguments"] == arguments else None


# ------------------------------------------------------------------ who gets which document
@dataclass
class _Target:
    """A source, or a domain's held-out part, being filled."""

    name: str
    kind: Kind
    wanted: int
    documents: list[str] = field(default_factory=list)
    characters: int = 0

    @property
    def need(self) -> float:
        """Share of what is wanted that is missing."""
        return 1 - self.characters / self.wanted if self.wanted else 0.0

    def takes(self, good: bool) -> bool:
        return self.characters < self.wanted and (good or not self.kind.best)


def _gather(
    wanted: Mapping[str, int], seed: int, kinds: Mapping[str, str], progress: Callable[[int], object]
) -> dict[str, list[str]]:
    """Deals documents, each new one to the target of its pool that is emptiest."""
    by_pool: dict[str, list[_Target]] = defaultdict(list)
    for name, size in wanted.items():
        kind = kind_of(name, kinds)
        for pool in kind.pools:
            by_pool[pool].append(_Target(name, kind, size // len(kind.pools)))
    seen: set[bytes] = set()
    for document in _documents(seed, by_pool):
        takers = [t for t in by_pool[document.pool] if t.takes(document.good)]
        if takers and _is_new(document, seen):
            taker = max(takers, key=lambda t: t.need)
            taker.documents.append(document.text)
            taker.characters += len(document.text)
            progress(len(document.text))
    result: dict[str, list[str]] = {name: [] for name in wanted}
    for target in (target for pool in by_pool.values() for target in pool):
        result[target.name] += target.documents
    return result


def _is_new(document: _Document, seen: set[bytes]) -> bool:
    """False if the document, a part of it, or one that begins like either was dealt before."""
    keys = {key for text in (document.text, *document.parts) for key in _keys(text)}
    if keys & seen:
        return False
    seen |= keys
    return True


def _keys(text: str) -> Iterator[bytes]:
    """What a text is recognised by: its letters and digits, whole and at the beginning."""
    letters = re.sub(r"[\W_]+", " ", text).strip().lower()
    for part in (letters, letters[:NEAR]):
        yield hashlib.blake2b(part.encode(), digest_size=12).digest()


@dataclass(frozen=True)
class _Document:
    pool: str
    text: str
    good: bool
    parts: tuple[str, ...] = ()
    """Texts inside it that are documents elsewhere: the docstrings of a code file."""


def _documents(seed: int, targets: Mapping[str, list[_Target]]) -> Iterator[_Document]:
    """Documents of every pool until its targets are full, or there are no more."""
    endless = {"problems": word_problems(Random(f"{seed} problems")), "lessons": lessons(Random(f"{seed} lessons"))}
    for pool, texts in endless.items():
        while any(t.takes(True) for t in targets.get(pool, [])):
            yield _Document(pool, next(texts), True)

    def wants(pool: str) -> bool:
        return any(t.takes(True) for t in targets.get(pool, []))

    for document in _mined(seed, wants):
        if not any(map(wants, MINED)):
            return
        yield document


# ------------------------------------------------------------------ what is on the machine
def _mined(seed: int, wants: Callable[[str], bool]) -> Iterator[_Document]:
    """Documents from help topics, descriptions and Python files, in a seeded order.

    A file gives either its code or its docstrings, so that no text is held out in one and trained on in the other.
    """
    origins: list[str | Path] = [*pydoc_data.topics.topics.values(), *_descriptions(), *python_files()]
    Random(f"{seed} files").shuffle(origins)
    for number, origin in enumerate(origins):
        if isinstance(origin, str):
            yield from _as_prose(origin)
            continue
        try:
            text = origin.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        docstrings = [d for d in _docstrings(tree) if len(d) >= SHORTEST_PROSE]
        if number % 3 == 0 and wants("code"):
            yield _Document("code", text[:LONGEST_DOCUMENT], _documented(text, tree), tuple(docstrings))
        elif number % 3 == 1 and wants("books") and sum(map(len, docstrings)) >= LONG_DOCUMENT:
            yield _Document("books", "\n\n".join(docstrings), True, tuple(docstrings))
        else:
            for docstring in docstrings:
                if _FORMULA.search(docstring):
                    yield _Document("formulas", docstring, True)
                else:
                    yield from _as_prose(docstring)


def _as_prose(text: str) -> Iterator[_Document]:
    if len(text) >= SHORTEST_PROSE and _is_prose(text):
        yield _Document("prose", text[:LONGEST_DOCUMENT], educational_score(text) >= 3)


def _descriptions() -> list[str]:
    """What the installed packages say of themselves, by name."""
    bodies = {d.metadata["Name"] or "": d.read_text("METADATA") or "" for d in importlib.metadata.distributions()}
    texts = (body.partition("\n\n")[2] for _, body in sorted(bodies.items()))
    return [re.sub(r"<[^>]+>|\[!\[.*?\)\]\(.*?\)|!\[.*?\)", "", text) for text in texts]


def python_files() -> list[Path]:
    """Python files of the standard library and the installed packages, by path; no tests, none very long or short."""
    paths = []
    for name in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(name))
        for path in root.rglob("*.py"):
            inside = path.relative_to(root).parts
            if (name == "stdlib" and "site-packages" in inside) or {"test", "tests", "idlelib"} & set(inside):
                continue
            if SMALLEST <= path.stat().st_size <= LARGEST:
                paths.append(path)
    return sorted(paths)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """The docstrings of a module, its classes and their functions."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if docstring := ast.get_docstring(node):
                yield docstring
            waiting += node.body


def _documented(text: str, tree: ast.Module) -> bool:
    """Whether at least a fifth of a file is documentation: docstrings and comment lines."""
    comments = sum(len(line) for line in text.splitlines() if line.lstrip().startswith("#"))
    return (sum(map(len, _docstrings(tree))) + comments) / len(text) >= 0.2


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c in " ,.;:'" for c in text)
    return letters / len(text) >= 0.8 and ". " in text


def educational_score(text: str) -> int:
    """0 to 5, one point each: explains, has whole sentences of a readable length, few symbols, enough of them, flows.

    A transparent stand-in for the classifier that keeps a score of 3 and more of the real data (paper §3).
    """
    sentences = [s for s in re.split(r"[.!?]\s+", text) if s.strip()]
    words = text.split()
    length = len(words) / max(1, len(sentences))
    symbols = sum(not (c.isalnum() or c.isspace() or c in ".,;:'-") for c in text) / len(text)
    explains = len(_TEACHING.findall(text.lower())) / max(1, len(sentences))
    flowing = sum(len(line) >= 50 for line in text.splitlines()) / max(1, len(text.splitlines()))
    return sum([explains >= 0.15, 8 <= length <= 35, symbols <= 0.05, len(sentences) >= 4, flowing >= 0.5])


# ------------------------------------------------------------------ parquet
def _write(folder: Path, documents: list[str], kind: Kind) -> None:
    """Writes documents in the columns of their dataset, in a few files, whole or not at all."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    files = max(1, min(FILES_PER_SOURCE, len(documents) // 8))
    for n in range(files):
        path = partial / "data" / f"train-{n:05d}-of-{files:05d}.parquet"
        pq.write_table(_table(documents[n::files], kind), path)
    sync_folder(partial)
    partial.replace(folder)


def _table(documents: list[str], kind: Kind) -> pa.Table:
    """The text in its dataset's column; where that is a list, in paragraphs with None for an image."""
    if kind.column != "text_list":
        columns: dict[str, list[Any]] = {kind.column: documents}
        if kind.best and kind.column == "text":
            columns["score"] = [educational_score(text) for text in documents]
        return pa.table(columns)
    lists = [[part for p in text.split("\n\n") for part in (p, None)][:-1] for text in documents]
    return pa.table({"text_list": pa.array(lists, pa.list_(pa.string()))})
