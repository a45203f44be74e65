"""One benchmark of one model, in this process: the real lighteval with what it needs to run, and to be right.

    python -m eval.worker --model FOLDER --benchmark NAME --shots N --out FILE

Exit code 0: the scores are in FILE; 2: one message says what is wrong; 1: a crash, with its traceback.
lighteval's own data parallelism mixes up samples between ranks, so there is one process and one device.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from eval import benchmarks
from eval.sandbox import check_sandbox
from recipes.errors import UserError
from recipes.files import write_atomic, write_json
from recipes.run import code_revision
from recipes.state import end_with_parent

PACKAGES = ("lighteval", "transformers", "torch", "datasets", "tokenizers")
PERCENT = ("acc", "acc_norm", "extractive_match", "qem", "exact_match", "pass@1")


def prepare_lighteval(data_root: Path | None) -> None:
    """Makes lighteval 0.13 importable beside nanotron, and lets it see this project's tasks alone.

    lighteval imports nanotron where it finds it, whose wheel has an import cycle; its registry imports all of its own
    task modules, some of which download at import; a local dataset's splits are named by its files here, and not by
    what `datasets` takes their names for.
    """
    import lighteval.utils.imports as imports

    found = imports.is_package_available

    def without_nanotron(package: Any) -> bool:
        name = package if isinstance(package, str) else getattr(package, "name", str(package))
        return False if name == "nanotron" else bool(found(package))

    imports.is_package_available = without_nanotron
    from lighteval.tasks.lighteval_task import LightevalTask
    from lighteval.tasks.registry import Registry

    def ours(custom_tasks: Any = None, **_: Any) -> Any:
        return Registry._extract_configs(Registry.create_custom_tasks_module(custom_tasks))

    Registry.load_all_task_configs = staticmethod(ours)
    if data_root is not None:
        LightevalTask.download_dataset_worker = staticmethod(local_dataset)


def local_dataset(task: Any) -> Any:
    """A local folder's splits, read anew each time."""
    from datasets import Dataset, DatasetDict, disable_caching

    disable_caching()
    files = benchmarks.local_files(Path(task.dataset_path))
    splits = {}
    for split in dict.fromkeys([*task.evaluation_split, *([task.fewshot_split] if task.fewshot_split else [])]):
        if split in files:
            splits[split] = Dataset.from_list(_rows(files[split]))
    return DatasetDict(splits)


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
        return rows
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs lighteval; returns the result's content (docs/formats.md).

    Raises:
        UserError: the model yields NaN, or something about the data.
    """
    os.environ["EVAL_BENCHMARK"] = arguments.benchmark
    if arguments.data_root is not None:
        os.environ["EVAL_DATA_ROOT"] = str(arguments.data_root)
    os.environ["EVAL_ALLOW_CODE"] = "1" if arguments.allow_code else "0"
    prepare_lighteval(arguments.data_root)
    pipeline = _pipeline(arguments)
    pipeline.model._cache = None  # keyed by the model's path: new weights there would get the old answers
    prompts = pipeline.model.prompt_manager  # evaluate() deletes the model
    pipeline.evaluate()
    tracker = pipeline.evaluation_tracker
    subtasks = {
        name.partition("|")[0].partition(":")[2] or arguments.benchmark: scores(name, values)
        for name, values in sorted(tracker.metrics_logger.metrics_values.items())
    }
    write_items(arguments.out.with_suffix(".items.jsonl"), tracker.details_logger.details, prompts)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    revision = code_revision()
    return {
        "benchmark": arguments.benchmark, "subtasks": subtasks,
        "version": benchmarks.DATASETS[arguments.benchmark].version,
        "versions": {**versions, "code": f"{revision['revision']}{'+changes' if revision['changed'] else ''}"},
    }  # fmt: skip


def _pipeline(arguments: argparse.Namespace) -> Any:
    from lighteval.logging.evaluation_tracker import EvaluationTracker
    from lighteval.models.transformers.transformers_model import TransformersModelConfig
    from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters

    names = benchmarks.lighteval_names(arguments.benchmark, arguments.data_root)
    parameters = PipelineParameters(
        launcher_type=ParallelismManager.ACCELERATE,
        custom_tasks_directory=str(Path(__file__).resolve().parent / "tasks.py"),
        max_samples=arguments.limit, bootstrap_iters=0, remove_reasoning_tags=False,
    )  # fmt: skip
    model = TransformersModelConfig(
        model_name=str(arguments.model), batch_size=arguments.batch_size, device=arguments.device,
        override_chat_template=False,  # a base model, even if its tokenizer has a chat template
        add_special_tokens=False,  # SmolLM2 was trained without a token that begins a text
    )  # fmt: skip
    tasks = ",".join(f"{name}|{arguments.shots}" for name in names)
    return Pipeline(
        tasks=tasks, pipeline_parameters=parameters, model_config=model,
        evaluation_tracker=EvaluationTracker(output_dir=str(arguments.out.parent), save_details=False),
    )  # fmt: skip


def scores(task: str, values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Mean, standard error of the mean and number of items of each metric; accuracies in percent.

    Raises:
        UserError: a value that is no number.
    """
    result = {}
    for metric, items in sorted(values.items()):
        if not all(math.isfinite(item) for item in items):
            fix = "look at the loss of the checkpoint: its weights or its logits are not finite"
            raise UserError(f"{task.partition('|')[0]}: the model yields NaN or infinity ({metric})", fix)
        scale = 100.0 if metric in PERCENT else 1.0
        stderr = statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else 0.0
        mean = math.fsum(items) / len(items)
        result[metric] = {"value": scale * mean, "stderr": scale * stderr, "items": len(items)}
    return result


def write_items(path: Path, details: dict[str, list[Any]], prompts: Any) -> None:
    """A line for each item and way of asking: the whole prompt, what was right, what the model wrote, its scores."""
    lines = []
    for task, items in sorted(details.items()):
        for item in items:
            line = {"task": task, "id": item.doc.id, "asked": prompts.prepare_prompt(item.doc),
                    "right": item.doc.get_golds()[:3], "wrote": list(item.model_response.text)[:1],
                    "scores": item.metric}  # fmt: skip
            lines.append(json.dumps(line, default=float) + "\n")
    write_atomic(path, "".join(lines))


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, evaluates, writes the result; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eval.worker", description="Evaluate one benchmark; `smol eval` starts it.")
    parser.add_argument("--model", type=Path, required=True, help="a folder in transformers' format")
    parser.add_argument("--benchmark", required=True)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--limit", type=int, help="items of each subtask")
    parser.add_argument("--out", type=Path, required=True, help="the result, JSON; the items go beside it")
    parser.add_argument("--data-root", type=Path, help="folder of local datasets, instead of the Hub's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--allow-code", action="store_true", help="let programs run that the model has written")
    parsed = parser.parse_args(arguments)
    try:
        benchmarks.check_data(parsed.benchmark, parsed.data_root, parsed.shots)
        if parsed.benchmark == "humaneval" and parsed.allow_code:
            check_sandbox()
        write_json(parsed.out, evaluate(parsed))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    end_with_parent()  # `smol eval` may be killed; its next start would find this one on the same device
    sys.exit(main())
