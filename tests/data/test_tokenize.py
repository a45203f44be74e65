"""Documents become token files whole or not at all, whatever ends the process that makes them."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from recipes.data.manifest import INDEX, MANIFEST, Manifest, count_file
from recipes.data.rank import run_rank
from recipes.data.tokenize import list_inputs, make_job, resolve_tokenizer, tokenize, train_tokenizer
from recipes.errors import UserError
from recipes.files import PARTIAL

END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]
ROOT = Path(__file__).resolve().parents[2]


def make_texts(count: int, seed: int, words: int = 60) -> list[str]:
    """Documents of made-up words, numbers and letters of several scripts."""
    rng = random.Random(seed)
    odd = ["größe", "数据", "Δ", "def f(x):\n", "  ", "3.14", "🙂"]

    def word() -> str:
        return rng.choice(odd) if rng.random() < 0.2 else "".join(rng.choices(["ba", "lo", "st", "ring", "e"], k=3))

    return [" ".join(word() for _ in range(rng.randint(1, words))) for _ in range(count)]


TEXTS = [make_texts(40, 1), make_texts(25, 2), make_texts(30, 3)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([text for texts in TEXTS for text in texts], 500, END, path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), TEXTS)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About two seconds of work in six files."""
    return write_corpus(tmp_path_factory.mktemp("large"), [make_texts(400, seed, 300) for seed in range(6)])


def write_corpus(folder: Path, files: list[list[Any]], column: str = "text") -> Path:
    (folder / "data").mkdir(parents=True)
    for number, texts in enumerate(files):
        table = pa.table({column: texts, "score": [0.5] * len(texts)})
        parquet.write_table(table, folder / "data" / f"{number:05d}.parquet")
    return folder


def documents(manifest: Manifest) -> list[list[np.ndarray]]:
    """Each file's documents, cut where the index says."""
    cut = []
    for file in manifest.files:
        tokens = np.fromfile(manifest.path(file), manifest.dtype)
        cut.append(np.split(tokens, manifest.document_ends(file)[:-1].astype(np.int64)))
    return cut


def texts_of(manifest: Manifest, tokenizer: Path) -> list[list[str]]:
    """Each file's documents as text, without the end of text that each must end in."""
    decode = Tokenizer.from_file(str(tokenizer)).decode
    for document in (document for file in documents(manifest) for document in file):
        assert document[-1] == manifest.end_of_text_id
        assert (document[:-1] != manifest.end_of_text_id).all()
    return [[decode(doc[:-1].tolist(), skip_special_tokens=False) for doc in file] for file in documents(manifest)]


def content(out: Path) -> dict[str, bytes]:
    """Every token file and index by name: what an undisturbed run and a disturbed one must agree in."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.ds*")) if is_data(path)}


def is_data(path: Path) -> bool:
    return path.name.endswith((".ds", ".ds" + INDEX))


def listed(manifest: Manifest) -> dict[str, bytes]:
    """The same of the files that the manifest counts."""
    return {entry.name: (manifest.folder / entry.name).read_bytes() for entry in manifest.entries}


# What the tokens are


def test_tokens_are_the_texts(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    manifest = tokenize("web", str(corpus), tmp_path / "out", tokenizer, END)
    found = texts_of(manifest, tokenizer)
    assert [sorted(file) for file in found] == [sorted(texts) for texts in TEXTS]
    assert found != TEXTS, "documents are shuffled within their file"
    assert manifest.documents == sum(map(len, TEXTS))
    assert (manifest.source, manifest.vocab_size, manifest.end_of_text_id, manifest.token_bytes) == ("web", 500, 0, 2)
    assert Manifest.load(tmp_path / "out") == manifest
    manifest.verify(checksums=True)


def test_workers_change_nothing(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    one = tokenize("web", str(corpus), tmp_path / "1", tokenizer, END, workers=1)
    two = tokenize("web", str(corpus), tmp_path / "2", tokenizer, END, workers=2)
    assert content(tmp_path / "1") == content(tmp_path / "2") == listed(one)
    assert one.entries == two.entries


def test_json_lines_give_the_tokens_of_parquet(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    lines = ["".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode() for texts in TEXTS]
    packers: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, zstandard.ZstdCompressor().compress]
    for number, (pack, ending) in enumerate(zip(packers, ("jsonl", "jsonl.gz", "jsonl.zst"), strict=True)):
        path = tmp_path / "lines" / "data" / f"{number:05d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(lines[number]))
    of_lines = tokenize("web", str(tmp_path / "lines"), tmp_path / "a", tokenizer, END)
    of_parquet = tokenize("web", str(corpus), tmp_path / "b", tokenizer, END)
    assert list(listed(of_lines).values()) == list(listed(of_parquet).values())


def test_a_remote_file_system_gives_the_same(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    local = tokenize("web", str(corpus), tmp_path / "a", tokenizer, END)
    remote = tokenize("web", f"file://{corpus}", tmp_path / "b", tokenizer, END)
    assert listed(local) == listed(remote)


def test_lists_are_joined_without_their_images(tokenizer: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", [[["Let x", None, "be 1."], [None, None], None, ["alone"]]], "text_list")
    manifest = tokenize("math", str(corpus), tmp_path / "out", tokenizer, END, text="text_list")
    assert sorted(texts_of(manifest, tokenizer)[0]) == ["Let x\nbe 1.", "alone"]


def test_half_a_surrogate_pair_is_replaced(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "a\\ud83d\\ude42b\\ud83dc"}\n')
    manifest = tokenize("web", str(tmp_path / "in"), tmp_path / "out", tokenizer, END)
    assert texts_of(manifest, tokenizer) == [["a🙂b\ufffdc"]]


def test_files_end_after_max_tokens(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    whole = tokenize("web", str(corpus), tmp_path / "whole", tokenizer, END)
    parts = tokenize("web", str(corpus), tmp_path / "parts", tokenizer, END, max_tokens_per_file=300)
    longest = max(len(document) for file in documents(whole) for document in file)
    assert len(parts.files) > len(whole.files)
    assert all(0 < file.tokens <= 300 + longest for file in parts.files)
    assert b"".join(listed(parts)[file.name] for file in parts.files) == b"".join(
        listed(whole)[file.name] for file in whole.files
    )


def test_a_vocabulary_above_16_bits(tmp_path: Path) -> None:
    vocabulary = {END: 0} | {f"w{n}": n for n in range(1, 70_000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus = write_corpus(tmp_path / "in", [["w65535 w65536 w69999"]])
    manifest = tokenize("web", str(corpus), tmp_path / "out", tmp_path / "tokenizer.json", END)
    assert manifest.token_bytes == 4
    assert [document.tolist() for document in documents(manifest)[0]] == [[65535, 65536, 69999, 0]]


def test_a_tokenizer_that_cuts_or_pads_is_kept_from_it(tokenizer: Path, tmp_path: Path) -> None:
    cutting = Tokenizer.from_file(str(tokenizer))
    cutting.enable_truncation(5)
    cutting.enable_padding(length=9, pad_id=3)
    cutting.save(str(tmp_path / "tokenizer.json"))
    corpus = write_corpus(tmp_path / "in", [["one", "a long document of many words"]])
    manifest = tokenize("web", str(corpus), tmp_path / "out", tmp_path / "tokenizer.json", END)
    assert sorted(texts_of(manifest, tokenizer)[0]) == ["a long document of many words", "one"]


PIECES = st.one_of(st.text(max_size=8), st.sampled_from([*SPECIAL, "<|endof", "text|>", " ", "\n", ""]))
NASTY = st.lists(PIECES, max_size=6).map("".join)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.none() | NASTY, max_size=12))
def test_any_texts(tokenizer: Path, tmp_path: Path, texts: list[str | None]) -> None:
    shutil.rmtree(tmp_path)
    (tmp_path / "in").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = make_test_job(tmp_path / "in", tmp_path / "out", tokenizer)
    rank = run_rank(job, 0)
    expected = sorted(text for text in texts if text and not text.isspace())
    assert rank.documents == len(expected)
    if expected:
        names = [f"{job.digest}/00000/{entry.name}" for entry in rank.entries if not entry.name.endswith(INDEX)]
        manifest = Manifest.of_files(
            tmp_path / "out", names, source="web", tokenizer_sha256="", vocab_size=500, end_of_text_id=0, token_bytes=2,
            config={},
        )  # fmt: skip
        assert sorted(texts_of(manifest, tokenizer)[0]) == expected


def make_test_job(corpus: Path, out: Path, tokenizer: Path, **changed: Any) -> Any:
    """The job that `tokenize` would do, with its folder as it is when the ranks begin."""
    root, inputs = list_inputs(str(corpus))
    config = {"end_of_text": END, "text": "text", "seed": 0, "max_tokens_per_file": None, **changed}
    job = make_job("web", root, inputs, out, tokenizer, **config)
    job.logs.mkdir(parents=True)
    (job.folder / "inputs.txt").write_text("".join(f"{name}\n" for name, _ in inputs))
    return job


# Nothing half-written counts


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return listed(tokenize("web", str(corpus), tmp_path_factory.mktemp("undisturbed"), tokenizer, END))


def test_stale_files_of_another_size_are_not_taken(
    corpus: Path, tokenizer: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """A rank that is done again starts empty (silent error 1)."""
    small = make_test_job(corpus, tmp_path / "small", tokenizer, max_tokens_per_file=100)
    run_rank(small, 0)
    job = make_test_job(corpus, tmp_path / "out", tokenizer)
    shutil.copytree(small.rank(0), job.rank(0).with_name(f"00000.{os.getpid()}{PARTIAL}"))
    assert len(list(small.rank(0).glob("*.ds"))) > 1
    rank = run_rank(job, 0)
    assert [entry.name for entry in rank.entries] == [
        "00000_00000_doc_shuffled.ds",
        "00000_00000_doc_shuffled.ds.index",
    ]
    assert listed(tokenize("web", str(corpus), tmp_path / "out", tokenizer, END)) == undisturbed


KILL_BEFORE_CLEANUP = """
    import os, pickle, sys
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile
    from recipes.data.rank import run_rank
    TokenizedFile.cleanup = lambda self: os.kill(os.getpid(), 9)
    run_rank(pickle.loads(bytes.fromhex(sys.argv[1])), 0)
"""


def test_killed_between_the_shuffled_file_and_the_unshuffled(
    corpus: Path, tokenizer: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """Both files are valid then, and only one may count (silent error 2)."""
    job = make_test_job(corpus, tmp_path / "out", tokenizer)
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL_BEFORE_CLEANUP), pickle.dumps(job).hex()], cwd=ROOT, stderr=-3
    )
    assert killed.returncode == -signal.SIGKILL
    shuffled, unshuffled = sorted(job.folder.glob("**/*.ds"))
    assert shuffled.stat().st_size == unshuffled.stat().st_size > 0
    assert listed(tokenize("web", str(corpus), tmp_path / "out", tokenizer, END)) == undisturbed
    assert content(tmp_path / "out") == undisturbed


BEGUN = f"*/0*{PARTIAL}"
"""Ranks at work."""

MAIN = """
    import sys
    from pathlib import Path
    from recipes.data.tokenize import tokenize
    if __name__ == "__main__":
        data, out, tokenizer = sys.argv[1:]
        tokenize("web", data, Path(out), Path(tokenizer), "<|endoftext|>", workers=2)
"""


def start(data: Path, out: Path, tokenizer: Path) -> subprocess.Popen[bytes]:
    """`tokenize` in its own session, so that what it leaves running can be found."""
    script = out.with_name("main.py")
    script.write_text(textwrap.dedent(MAIN))
    command = [sys.executable, str(script), str(data), str(out), str(tokenizer)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)


def wait_until(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.005)


def is_gone(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return True
    return False


def kills(seed: int, count: int) -> Iterator[tuple[int, float]]:
    """How many ranks must have begun, and how many seconds later the kill comes."""
    rng = random.Random(seed)
    return ((rng.randint(0, 2), rng.uniform(0, 0.6)) for _ in range(count))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment(large: Path, tokenizer: Path, tmp_path: Path, seed: int) -> None:
    expected = listed(tokenize("web", str(large), tmp_path / "expected", tokenizer, END, workers=2))
    out = tmp_path / "out"
    unfinished = 0
    for begun, delay in kills(seed, 5):
        process = start(large, out, tokenizer)
        wait_until(lambda: process.poll() is not None or len(list(out.glob(BEGUN))) >= begun)  # noqa: B023
        time.sleep(delay)
        unfinished += process.poll() is None
        process.kill()
        process.communicate()
        wait_until(lambda: is_gone(process.pid))  # noqa: B023
    assert unfinished
    manifest = tokenize("web", str(large), out, tokenizer, END, workers=2)
    assert listed(manifest) == content(out) == expected
    assert not list(out.rglob(f"*{PARTIAL}"))


@pytest.mark.slow
def test_interrupted_by_the_keyboard(large: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(large, out, tokenizer)
    wait_until(lambda: bool(list(out.glob("*/*/rank.json"))))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    wait_until(lambda: is_gone(process.pid))
    assert b"KeyboardInterrupt" in errors
    assert not (out / MANIFEST).exists()
    done = list(out.glob("*/*/rank.json"))
    before = [path.stat().st_mtime_ns for path in done]
    manifest = tokenize("web", str(large), out, tokenizer, END, workers=2)
    assert [path.stat().st_mtime_ns for path in done] == before, "complete ranks are kept"
    assert len(manifest.files) == 6


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run(large: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Out of memory, say: datatrove's own pool would wait for it for ever."""
    out = tmp_path / "out"

    def kill_a_worker() -> None:
        wait_until(lambda: bool(list(out.glob(BEGUN))))
        os.kill(int(next(out.glob(BEGUN)).name.split(".")[1]), signal.SIGKILL)

    thread = threading.Thread(target=kill_a_worker, daemon=True)
    thread.start()
    with pytest.raises(UserError, match="a worker process ended"):
        tokenize("web", str(large), out, tokenizer, END, workers=2)
    thread.join()
    assert not (out / MANIFEST).exists()


def test_nothing_of_datatrove_is_seen(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path / "out", tokenizer)
    _, errors = process.communicate()
    assert process.returncode == 0
    assert b"3/3 files" in errors
    assert b"95 documents" in errors
    assert len(errors.splitlines()) == 1
    assert "Tokenizing in" in next(tmp_path.glob("out/*/logs/workers.log")).read_text()


def test_alone_in_a_folder(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            tokenize("web", str(corpus), tmp_path / "out", tokenizer, END)
    tokenize("web", str(corpus), tmp_path / "out", tokenizer, END)


def lose_a_document(self: TokenizedFile, name: str, ordering: np.ndarray, *rest: Any, **named: Any) -> TokenizedFile:
    return COPY(self, name, ordering[:-1], *rest, **named)


def note_another_count(self: TokenizedFile) -> None:
    WRITE_NOTE(self, token_count=7)


COPY, WRITE_NOTE = TokenizedFile.copy, TokenizedFile.write_final_metadata


@pytest.mark.parametrize(
    ("name", "defect", "found"),
    [
        ("copy", lose_a_document, "in the files, .* written"),
        ("write_final_metadata", note_another_count, "7 tokens by"),
    ],
)
def test_files_that_are_not_what_was_written(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, defect: Any, found: str
) -> None:
    job = make_test_job(corpus, tmp_path / "out", tokenizer)
    monkeypatch.setattr(TokenizedFile, name, defect)
    with pytest.raises(UserError, match=found):
        run_rank(job, 0)
    assert not job.rank(0).exists()


# What is complete is kept, for the same configuration only


def test_a_second_call_does_nothing(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    first = tokenize("web", str(corpus), tmp_path, tokenizer, END)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert tokenize("web", str(corpus), tmp_path, tokenizer, END) == first
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("changed", [{"seed": 1}, {"max_tokens_per_file": 100}, {"end_of_text": "<|im_end|>"}])
def test_another_configuration_is_done_anew(
    corpus: Path, tokenizer: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """Complete ranks of other settings do not count (silent error 4); they go once the new ones are in place."""
    tokenize("web", str(corpus), tmp_path / "out", tokenizer, END)
    arguments = {"end_of_text": END, **changed}
    again = tokenize("web", str(corpus), tmp_path / "out", tokenizer, **arguments)
    fresh = tokenize("web", str(corpus), tmp_path / "fresh", tokenizer, **arguments)
    assert content(tmp_path / "out") == listed(again) == listed(fresh)


def test_another_input_is_done_anew(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "in")
    tokenize("web", str(tmp_path / "in"), tmp_path / "out", tokenizer, END)
    (tmp_path / "in" / "data" / "00001.parquet").unlink()
    manifest = tokenize("web", str(tmp_path / "in"), tmp_path / "out", tokenizer, END)
    assert manifest.documents == len(TEXTS[0]) + len(TEXTS[2])


def test_the_old_data_count_until_the_new_are_complete(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    old = tokenize("web", str(corpus), tmp_path, tokenizer, END)
    with pytest.raises(UserError, match="no column"):
        tokenize("web", str(corpus), tmp_path, tokenizer, END, text="body")
    assert Manifest.load(tmp_path) == old
    old.verify(checksums=True)


def test_other_folders_are_left_alone(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    for name in ("heldout", "0123456789abcdef0", "0123456789abcde"):
        (tmp_path / name).mkdir()
    (tmp_path / "0123456789abcdef").mkdir()
    tokenize("web", str(corpus), tmp_path, tokenizer, END)
    assert {"heldout", "0123456789abcdef0", "0123456789abcde"} < {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "0123456789abcdef").exists()


def test_a_source_of_another_name_is_not_tokenised_again(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    first = tokenize("web", str(corpus), tmp_path, tokenizer, END)
    before = (tmp_path / first.files[0].name).stat().st_mtime_ns
    assert tokenize("prose", str(corpus), tmp_path, tokenizer, END).source == Manifest.load(tmp_path).source == "prose"
    assert (tmp_path / first.files[0].name).stat().st_mtime_ns == before


def remove_rank(rank: Path) -> None:
    shutil.rmtree(rank)


def truncate_tokens(rank: Path) -> None:
    path = next(rank.glob("*.ds"))
    path.write_bytes(path.read_bytes()[:100])


def lose_index(rank: Path) -> None:
    next(rank.glob("*.ds.index")).unlink()


def garble_record(rank: Path) -> None:
    (rank / "rank.json").write_text("{")


@pytest.mark.parametrize("damage", [remove_rank, truncate_tokens, lose_index, garble_record])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_damaged_rank_is_done_again(
    corpus: Path, tokenizer: Path, tmp_path: Path, damage: Callable[[Path], None], with_manifest: bool
) -> None:
    """And the totals are those of all ranks, not only of the ones done now (silent error 5)."""
    first = tokenize("web", str(corpus), tmp_path, tokenizer, END)
    expected, rank = listed(first), (tmp_path / first.files[1].name).parent
    damage(rank)
    if not with_manifest:
        (tmp_path / MANIFEST).unlink()
    again = tokenize("web", str(corpus), tmp_path, tokenizer, END)
    assert again == first
    assert again.documents == sum(map(len, TEXTS))
    again.verify(checksums=True)
    if damage is not garble_record or not with_manifest:
        assert content(tmp_path) == expected


# What cannot be tokenised says so


def test_special_tokens_in_a_text_are_text(tokenizer: Path, tmp_path: Path) -> None:
    """Otherwise a document would end where its index does not (silent error 3)."""
    texts = [f"before{mark}after {mark}" for mark in SPECIAL] + [END, "<|endof<|endoftext|>text|>"]
    manifest = tokenize("web", str(write_corpus(tmp_path / "in", [texts])), tmp_path / "out", tokenizer, END)
    assert sorted(texts_of(manifest, tokenizer)[0]) == sorted(texts)
    assert not np.isin(np.concatenate([document[:-1] for document in documents(manifest)[0]]), [0, 1, 2]).any()


def test_an_end_of_text_that_is_no_special_token(tokenizer: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", [["loss and step"]])
    piece = Tokenizer.from_file(str(tokenizer)).encode("loss and step").tokens[0]
    with pytest.raises(UserError, match="it a special token of the tokenizer"):
        tokenize("web", str(corpus), tmp_path / "out", tokenizer, piece)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_column_that_is_not_there(corpus: Path, tokenizer: Path, tmp_path: Path, kind: str) -> None:
    """datatrove gives 0 documents and a warning (silent error 6); one file of many is enough."""
    shutil.copytree(corpus, tmp_path / "in")
    if kind == "parquet":
        parquet.write_table(pa.table({"content": ["x"], "id": [1]}), tmp_path / "in" / "last.parquet")
    else:
        (tmp_path / "in" / "last.jsonl").write_text('{"content": "x"}\n{"id": 1}\n')
    with pytest.raises(UserError, match=rf"last\.{kind}: no column 'text'. Name the column of the text: content, id\."):
        tokenize("web", str(tmp_path / "in"), tmp_path / "out", tokenizer, END)


def test_no_text_at_all(tokenizer: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", [["", None, " \n"], []])
    for _ in range(2):
        with pytest.raises(UserError, match=r"no document has text in the column 'text'.*: score, text"):
            tokenize("web", str(corpus), tmp_path / "out", tokenizer, END)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_file_without_documents_beside_others(tokenizer: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", [["one"], [], ["two"]])
    assert tokenize("web", str(corpus), tmp_path / "out", tokenizer, END).documents == 2


def test_a_column_of_numbers(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"parquet: the column 'score' holds float, not text.*score, text"):
        tokenize("web", str(corpus), tmp_path / "out", tokenizer, END, text="score")


@pytest.mark.parametrize("name", ["torn.jsonl", "torn.jsonl.gz", "torn.parquet", "torn.jsonl.zst"])
def test_damaged_input(tokenizer: Path, tmp_path: Path, name: str) -> None:
    line = json.dumps({"text": "some text " * 500}).encode() + b"\n"
    packed = {"jsonl": bytes, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress, "parquet": bytes}
    whole = packed[name.rsplit(".")[-1]](line * 3)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(whole[:-2])
    with pytest.raises(UserError, match=rf"{name}: (line 3: not a JSON object|cannot be read)"):
        tokenize("web", str(tmp_path / "in"), tmp_path / "out", tokenizer, END)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_packed_input_in_several_parts(tokenizer: Path, tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """Parts may end inside a line; and one that is cut where a line ends is not taken for a shorter file."""
    texts = make_texts(60, 4)
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    path = tmp_path / "in" / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    path.parent.mkdir()
    path.write_bytes(b"".join(pack(lines[start : start + 1000]) for start in range(0, len(lines), 1000)))
    manifest = tokenize("web", str(path.parent), tmp_path / "out", tokenizer, END)
    assert sorted(texts_of(manifest, tokenizer)[0]) == sorted(texts)
    noise = json.dumps({"text": random.Random(0).randbytes(200_000).hex()}).encode() + b"\n"
    path.write_bytes(pack(noise) + pack(noise)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        tokenize("web", str(path.parent), tmp_path / "out", tokenizer, END)


@pytest.mark.parametrize("line", ["[1]", "3", "null", "text", ""])
def test_a_line_that_is_no_object(tokenizer: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: not a JSON object"):
        tokenize("web", str(tmp_path / "in"), tmp_path / "out", tokenizer, END)


def test_inputs_by_path_and_glob(tmp_path: Path) -> None:
    for name in ("b/x.parquet", "a/y.jsonl.zst", "a/z.jsonl", "README.md", "a/z.jsonl.partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("abc")
    assert list_inputs(str(tmp_path))[1] == [("a/y.jsonl.zst", 3), ("a/z.jsonl", 3), ("b/x.parquet", 3)]
    assert list_inputs(str(tmp_path), "a/*")[1] == [("a/y.jsonl.zst", 3), ("a/z.jsonl", 3)]
    with pytest.raises(UserError, match=r"no input among its 5 files.*matching \*\.csv"):
        list_inputs(str(tmp_path), "*.csv")


def test_no_such_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list_inputs(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"cannot be listed"):
        list_inputs("nosuchprotocol://bucket/data")


def test_tokenizers_that_will_not_do(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no token '<eos>'.*<\|endoftext\|>, <\|im_start\|>"):
        tokenize("web", str(corpus), tmp_path / "out", tokenizer, "<eos>")
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "tokenizer.json", tmp_path / "none.json"):
        with pytest.raises(UserError, match="cannot be read as a tokenizer"):
            tokenize("web", str(corpus), tmp_path / "out", path, END)


def test_a_token_file_without_its_index(tmp_path: Path) -> None:
    (tmp_path / "a.ds").write_bytes(b"12")
    with pytest.raises(UserError, match=r"a\.ds\.index: this file is missing"):
        count_file(tmp_path, "a.ds", 2)


# Tokenizers


@given(st.text())
def test_a_trained_tokenizer_loses_nothing(tokenizer: Path, text: str) -> None:
    trained = Tokenizer.from_file(str(tokenizer))
    trained.encode_special_tokens = True
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_training_is_repeatable(tokenizer: Path, tmp_path: Path) -> None:
    script = (
        "import json, sys; from pathlib import Path; from recipes.data.tokenize import train_tokenizer;"
        f"train_tokenizer(iter(json.load(sys.stdin)), 500, {END!r}, Path(sys.argv[1]))"
    )
    texts = json.dumps([text for texts in TEXTS for text in texts])
    subprocess.run([sys.executable, "-c", script, tmp_path / "t.json"], input=texts, text=True, check=True, cwd=ROOT)
    assert (tmp_path / "t.json").read_bytes() == tokenizer.read_bytes()
    trained = Tokenizer.from_file(str(tokenizer))
    assert [trained.id_to_token(n) for n in range(3)] == SPECIAL
    assert trained.get_vocab_size() == 500
    assert len(trained.encode("2026").ids) == 4


def test_too_little_text_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give 260 entries, not 4,096"):
        train_tokenizer(["ab"], 4096, END, tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def test_resolving_a_tokenizer(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_tokenizer(str(tokenizer)) == resolve_tokenizer(str(tokenizer.parent)) == tokenizer
    with pytest.raises(UserError, match=r"no tokenizer\.json in this folder"):
        resolve_tokenizer(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", str(tmp_path / "tokenizer.json")):
        with pytest.raises(UserError, match="neither a local path nor to be had from the Hub"):
            resolve_tokenizer(name, tmp_path / "cache")


def test_errors_come_back_from_workers() -> None:
    error = pickle.loads(pickle.dumps(UserError("found", "fix", "file", "line 3")))
    assert (str(error), error.where) == (str(UserError("found", "fix", "file", "line 3")), "line 3")
