"""Local datasets: what is missing is named before lighteval starts; the Hub's are commits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.benchmarks import DATASETS, MMLU, check_data, data_identity, lighteval_names, task_file_hash
from recipes.errors import UserError
from tests.eval.fixtures import datasets, write_datasets


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_datasets(tmp_path / "data")


def refused(benchmark: str, root: Path | None, shots: int = 0) -> str:
    with pytest.raises(UserError) as error:
        check_data(benchmark, root, shots)
    return str(error.value)


def test_every_fixture_is_accepted(root: Path) -> None:
    for name in DATASETS:
        check_data(name, root, shots=5 if name in ("gsm8k", "math") else 0)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_column_that_is_missing_is_named(root: Path, name: str) -> None:
    place, dataset = DATASETS[name].folder or name, DATASETS[name]
    key = next(k for k in datasets() if k.startswith(f"{place}/") and k.endswith(f"/{dataset.split}"))
    for column in dataset.columns:
        rows = [{k: v for k, v in row.items() if k != column} for row in datasets()[key]]
        (root / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert f"the column {column} is missing" in refused(name, root)


def test_an_empty_folder_file_or_set_of_subtasks(root: Path) -> None:
    (root / "gsm8k" / "test.jsonl").write_text("")
    assert "gsm8k/test.jsonl" in (said := refused("gsm8k", root)) and "no items" in said
    (root / "gsm8k" / "test.jsonl").unlink()
    assert "no test.jsonl or test.parquet" in refused("gsm8k", root)
    (root / "arc" / "easy" / "test.jsonl").write_text("{")
    assert "cannot be read" in refused("arc", root)
    for folder in ("mmlu/anatomy", "mmlu/virology"):
        (root / folder / "test.jsonl").unlink()
        (root / folder).rmdir()
    assert "none of its 57 subtasks" in refused("mmlu-mc", root)


def test_shots_need_their_split(root: Path) -> None:
    (root / "gsm8k" / "train.jsonl").unlink()
    check_data("gsm8k", root, shots=0)
    assert "train.jsonl" in refused("gsm8k", root, shots=5)


def test_too_few_shots_are_not_made_do_with(root: Path) -> None:
    """lighteval takes those there are, and says nothing."""
    train = root / "gsm8k" / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:4]))
    check_data("gsm8k", root, shots=4)
    assert "4 rows, where 5 are to be shots" in refused("gsm8k", root, shots=5)


def test_parquet_is_read_too(root: Path) -> None:
    (root / "gsm8k" / "test.jsonl").unlink()
    pq.write_table(pa.table({"question": ["1?"], "answer": ["#### 1"]}), root / "gsm8k" / "test.parquet")
    check_data("gsm8k", root)
    pq.write_table(pa.table({"question": ["1?"]}), root / "gsm8k" / "test.parquet")
    assert "the column answer is missing" in refused("gsm8k", root)


def test_unknown_and_local_only_benchmarks() -> None:
    assert "there is no benchmark 'gsm9k'" in refused("gsm9k", None)
    assert "--data-root" in refused("docs-choice", None)


def test_mmlu_has_its_57_subjects(root: Path) -> None:
    assert len(set(MMLU.split())) == 57
    assert len(lighteval_names("mmlu-mc", None)) == 57
    assert lighteval_names("mmlu-cloze", root) == ["mmlu-cloze:anatomy", "mmlu-cloze:virology"]


def test_the_identity_is_that_of_the_content(root: Path) -> None:
    before = {name: data_identity(name, root) for name in ("gsm8k", "arc")}
    path = root / "gsm8k" / "test.jsonl"
    path.write_text(path.read_text().replace("coins", "stones", 1))
    assert data_identity("gsm8k", root) != before["gsm8k"]
    assert data_identity("arc", root) == before["arc"]


def test_every_dataset_of_the_hub_is_pinned_to_a_commit() -> None:
    for benchmark, dataset in DATASETS.items():
        if dataset.hub:
            assert re.fullmatch("[0-9a-f]{40}", dataset.revision or ""), benchmark
            assert data_identity(benchmark, None) == f"{dataset.hub}@{dataset.revision}"


def test_the_task_files_decide_the_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = task_file_hash()
    here = Path(__file__).resolve().parent.parent.parent / "eval"
    for file in here.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("eval.benchmarks.__file__", str(tmp_path / "benchmarks.py"))
    assert task_file_hash() == before
    (tmp_path / "metrics.py").write_text((tmp_path / "metrics.py").read_text() + "\n")
    assert task_file_hash() != before
