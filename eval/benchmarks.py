"""Which dataset each benchmark reads, and whether it is there. Light: neither lighteval nor datasets is imported.

A local folder takes the Hub's place with `--data-root`: `<root>/<folder>/<split>.jsonl` (or .parquet), and where the
dataset has subsets `<root>/<folder>/<subtask>/<split>.jsonl`, with the Hub's columns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import xxhash

from recipes.errors import UserError
from recipes.files import list_files

SEED = 42
"""lighteval's own, fixed in its code: of the items that a limit draws and of the shots."""
MMLU = (
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry "
    "college_computer_science college_mathematics college_medicine college_physics computer_security "
    "conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_european_history "
    "high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics "
    "high_school_microeconomics high_school_physics high_school_psychology high_school_statistics "
    "high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence "
    "logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes "
    "moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine "
    "professional_psychology public_relations security_studies sociology us_foreign_policy virology world_religions"
)
MATH = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"


@dataclass(frozen=True)
class Dataset:
    """Where a benchmark's items come from."""

    hub: str | None
    """Dataset id; none: only a local folder."""
    subset: str
    """The Hub's configuration; ignored where there are subtasks."""
    split: str
    columns: tuple[str, ...]
    subtasks: tuple[tuple[str, str], ...] = ()
    """Name and the Hub's configuration of each."""
    shots_split: str | None = None
    revision: str | None = None
    """A commit, never a branch: docs/decisions.md says where it was found."""
    folder: str | None = None
    """Below the data root, if it is not the benchmark's name."""
    version: int = 1
    """Of the prompt and the metrics: raised when either changes."""


def _same(names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name in names.split())


_MMLU = Dataset(
    "cais/mmlu", "", "test", ("question", "subject", "choices", "answer"), _same(MMLU), "dev",
    revision="c30699e8356da336a370243923dbaf21066bb9fe", folder="mmlu",
)  # fmt: skip
_CHOICE = ("context", "choices", "label")
DATASETS = {
    "mmlu-mc": _MMLU,
    "mmlu-cloze": _MMLU,
    # The revision is the one in lighteval 0.13.0's own task.
    "mmlu-pro": Dataset("TIGER-Lab/MMLU-Pro", "default", "test", ("question", "options", "answer_index", "category"),
                        revision="3373e0b32277875b8db2aa555a333b78a08477ea"),
    "gsm8k": Dataset("openai/gsm8k", "main", "test", ("question", "answer"), shots_split="train",
                     revision="740312add88f781978c0658806c59bc2815b9866"),
    "math": Dataset("DigitalLearningGmbH/MATH-lighteval", "", "test", ("problem", "solution"), _same(MATH), "train",
                    revision="0530c78699ea5e8eb5530600900e1f328b48acad"),
    "hellaswag": Dataset("Rowan/hellaswag", "default", "validation",
                         ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
                         revision="218ec52e09a7e7462a5400043bb9a69a41d06b76"),
    "arc": Dataset("allenai/ai2_arc", "", "test", ("question", "choices", "answerKey"),
                   (("easy", "ARC-Easy"), ("challenge", "ARC-Challenge")),
                   revision="210d026faf9955653af8916fad021475a3f00453"),
    # A copy in parquet: ybisk/piqa is a script, which `datasets` no longer runs.
    "piqa": Dataset("baber/piqa", "default", "validation", ("goal", "sol1", "sol2", "label"),
                    revision="142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"),
    "winogrande": Dataset("allenai/winogrande", "winogrande_xl", "validation",
                          ("sentence", "option1", "option2", "answer"),
                          revision="01e74176c63542e6b0bcb004dcdea22d94fb67b5"),
    "openbookqa": Dataset("allenai/openbookqa", "main", "test", ("question_stem", "choices", "answerKey"),
                          revision="388097ea7776314e93a529163e0fea805b8a6454"),
    "commonsenseqa": Dataset("tau/commonsense_qa", "default", "validation", ("question", "choices", "answerKey"),
                             revision="94630fe30dad47192a8546eb75f094926d47e155"),
    "triviaqa": Dataset("mandarjoshi/trivia_qa", "rc.nocontext", "validation", ("question", "answer"),
                        revision="0f7faf33a3908546c6fd5b73a660e0f8ff173c2f"),
    "humaneval": Dataset("openai/openai_humaneval", "openai_humaneval", "test",
                         ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
                         revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"),
    "docs-choice": Dataset(None, "", "test", _CHOICE),
    "code-choice": Dataset(None, "", "test", _CHOICE),
    "word-problems": Dataset(None, "", "test", ("question", "answer")),
}  # fmt: skip


def lighteval_names(benchmark: str, data_root: Path | None) -> list[str]:
    """lighteval's names of a benchmark's subtasks: `arc:easy`, or the benchmark's own; locally those there are."""
    dataset = DATASETS[benchmark]
    names = [name for name, _ in dataset.subtasks]
    if data_root is not None and names:
        names = [name for name in names if (_folder(benchmark, data_root) / name).is_dir()]
    return [f"{benchmark}:{name}" for name in names] if dataset.subtasks else [benchmark]


def local_folder(lighteval_name: str, data_root: Path) -> Path:
    """The folder of a subtask's files."""
    benchmark, _, subtask = lighteval_name.partition(":")
    return _folder(benchmark, data_root) / subtask


def _folder(benchmark: str, data_root: Path) -> Path:
    return data_root / (DATASETS[benchmark].folder or benchmark)


def local_files(folder: Path) -> dict[str, Path]:
    """The files of a local dataset by split."""
    return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix in (".jsonl", ".parquet")}


def check_data(benchmark: str, data_root: Path | None, shots: int = 0) -> None:
    """Looks whether a benchmark's local data can be read; of the Hub's nothing is checked here.

    Raises:
        UserError: no such benchmark; a folder, a split, items, shots or a column are missing.
    """
    if benchmark not in DATASETS:
        raise UserError(f"there is no benchmark '{benchmark}'", f"name one of {', '.join(DATASETS)}")
    dataset = DATASETS[benchmark]
    if data_root is None:
        if dataset.hub is None:
            raise UserError(f"{benchmark} is on no Hub", "give a folder with --data-root")
        return
    names = lighteval_names(benchmark, data_root)
    if not names:
        fix = "add one folder for each subtask you have, with its split's file inside"
        raise UserError(f"{benchmark} has none of its {len(dataset.subtasks)} subtasks here", fix,
                        _folder(benchmark, data_root))  # fmt: skip
    least = {dataset.split: 1, **({dataset.shots_split: shots} if shots and dataset.shots_split else {})}
    for folder in (local_folder(name, data_root) for name in names):
        for split, rows in least.items():
            _check_split(folder, split, dataset.columns, rows)


def _check_split(folder: Path, split: str, columns: tuple[str, ...], least: int) -> None:
    file = local_files(folder).get(split)
    if file is None:
        there = ", ".join(sorted(p.name for p in folder.glob("*"))) if folder.is_dir() else "no such folder"
        raise UserError(f"no {split}.jsonl or {split}.parquet ({there or 'the folder is empty'})", "add it", folder)
    rows, found = _rows_and_columns(file)
    if rows < least:
        text = f"{rows} rows, where {least} are to be shots" if rows else "this dataset has no items"
        raise UserError(text, f"write at least {least}", file)
    if missing := [name for name in columns if name not in found]:
        text = f"the column {' and '.join(missing)} is missing; there are {', '.join(found) or 'none'}"
        raise UserError(text, "write the columns that the Hub's dataset has", file)


def _rows_and_columns(file: Path) -> tuple[int, list[str]]:
    """How many rows a file has, and the columns of the first.

    Raises:
        UserError: it is damaged.
    """
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            table = pq.ParquetFile(file)
            return table.metadata.num_rows, list(table.schema_arrow.names)
        with open(file, encoding="utf-8") as lines:
            rows = [line for line in lines if line.strip()]
        return len(rows), list(json.loads(rows[0])) if rows else []
    except (OSError, ValueError) as error:
        raise UserError(f"this dataset cannot be read ({error})", "write it again", file) from None


def data_identity(benchmark: str, data_root: Path | None) -> str:
    """`<hub id>@<commit>`, or `local:<xxh3-128 of names and contents>`."""
    dataset = DATASETS[benchmark]
    if data_root is None:
        return f"{dataset.hub}@{dataset.revision}"
    folder = _folder(benchmark, data_root)
    listing = json.dumps([(entry.name, entry.xxh3_128) for entry in list_files(folder)])
    return f"local:{xxhash.xxh3_128_hexdigest(listing.encode())}"


def task_file_hash() -> str:
    """xxh3-128 of the files that decide a score."""
    here = Path(__file__).resolve().parent
    digest = xxhash.xxh3_128()
    for name in ("benchmarks.py", "tasks.py", "metrics.py", "sandbox.py", "sandbox_inside.py", "worker.py"):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()
