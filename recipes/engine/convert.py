"""Checkpoints between Nanotron 0.4's files and transformers' format, tensor by tensor.

Nanotron keeps a folder for each parameter, with one file for each tensor-parallel rank. layout.py says what becomes of
it. Values are never computed with, so there and back is bit-exact.

Nanotron is not imported and no model is built; one file of the output and one parameter are in memory at most.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recipes.data.manifest import tokenizer_sha256 as sha256_of
from recipes.engine.checkpoint import MANIFEST, Checkpoint, Topology, check_space, commit, partial_folder
from recipes.engine.layout import Llama, Parameter, read_json
from recipes.engine.vocabulary import Vocabulary, copy_tokenizer
from recipes.errors import UserError
from recipes.files import PARTIAL, FileEntry, checksum, list_files, sync_folder, verify_files, write_json
from recipes.run import Run

CONVERSION = "conversion.json"
"""What a folder in transformers' format was made from; written last."""
FORMAT = 1
"""Of the conversion: to be raised when this module writes other files for the same checkpoint."""
SHARD_BYTES = 2_000_000_000
"""Of a file of weights at most. chosen: it bounds the memory of a conversion; the 1.7B in bf16 makes two files."""
VERSION = "1.2"
"""nanotron.constants.CHECKPOINT_VERSION of Nanotron 0.4."""
CONVERTED = "converted"
"""The stage of a checkpoint that was not trained here."""


# To transformers


def to_transformers(
    checkpoint: Path, out: Path, tokenizer: Path | None = None, *, shard_bytes: int = SHARD_BYTES,
    progress: Console | None = None,
) -> Path:  # fmt: skip
    """Writes a checkpoint in transformers' format to the folder `out`, which is there when it is complete.

    Args:
        tokenizer: a tokenizer.json, for a checkpoint that lies in no run; in a run it must be the run's.
        shard_bytes: of a file of weights at most, unless one tensor is larger.
        progress: where a bar is shown.

    Returns:
        `out`; it is kept as it is if it holds this conversion already.

    Raises:
        UserError: the checkpoint is damaged, another tokenizer's, or no Llama; there is something else at `out`.
        OSError: the disk is full; nothing is left at `out`.
    """
    if not (checkpoint / MANIFEST).is_file() and (checkpoint / "config.json").is_file():
        fix = "add --to nanotron to make a checkpoint of it"
        raise UserError("this is a model in transformers' format already", fix, checkpoint)
    source = Checkpoint.load(checkpoint)
    vocabulary = Vocabulary.of(source, tokenizer)
    origin = {
        "format": FORMAT, "manifest": checksum(checkpoint / MANIFEST), "recipe": source.recipe, "stage": source.stage,
        "step": source.step, "tokenizer_sha256": sha256_of(vocabulary.file),
    }  # fmt: skip
    if out.exists():
        _keep(out, origin)
        return out
    source.verify()
    model = Llama.of_checkpoint(checkpoint)
    vocabulary.check_size(model.vocab_size)
    weights = Weights(source, model)
    with _whole(out, weights.bytes) as partial:
        dtype = _write_shards(weights.tensors(progress), partial, shard_bytes)
        _write_settings(model, vocabulary, dtype, partial)
        files = list_files(partial)
        _settle(partial, files)
        write_json(partial / CONVERSION, {**origin, "files": [asdict(entry) for entry in files]})
    return out


def _keep(out: Path, origin: dict[str, Any]) -> None:
    """Raises UserError unless `out` is a whole conversion of `origin`."""
    path, fix = out / CONVERSION, "name another folder, or delete this one"
    if not path.is_file():
        raise UserError("there is something here already, and it is no conversion", fix, out)
    content = read_json(path)
    files = [FileEntry(**entry) for entry in content.pop("files", [])]
    if content != origin:
        found = f"a conversion of {content.get('recipe')}, {content.get('stage')}, step {content.get('step')}"
        raise UserError(f"{found} is here already, of another checkpoint, tokenizer or format", fix, out)
    verify_files(out, files, checksums=False)


class Weights:
    """A checkpoint's parameters, each put together from the files of all its ranks."""

    def __init__(self, source: Checkpoint, model: Llama) -> None:
        """Finds the files.

        Raises:
            UserError: the checkpoint lacks a parameter of the model, or has others.
        """
        self.folder, self.parameters = source.folder, model.parameters
        self.files: dict[str, list[Path]] = {p.folder: [] for p in self.parameters}
        entries = [entry for entry in source.files if entry.name.startswith("model/")]
        self.bytes = sum(entry.bytes for entry in entries)
        for entry in entries:
            place = entry.name.removeprefix("model/model/").rpartition("/")[0]
            if place not in self.files:
                found = f"the parameter {place} is none of the model that model_config.json describes"
                raise UserError(found, "convert a Llama's checkpoint", source.folder / entry.name)
            self.files[place].append(source.folder / entry.name)
        if missing := [place for place, files in self.files.items() if not files]:
            raise UserError(f"the parameter {missing[0]} is missing", "name a whole checkpoint", source.folder)

    def tensors(self, progress: Console | None = None) -> Iterator[tuple[str, Tensor]]:
        """Transformers' tensors by name, made one parameter at a time."""
        for parameter in _tracked(self.parameters, progress):
            whole = read_whole(self.files[parameter.folder], parameter.shape)
            yield from parameter.split(whole).items()


def read_whole(files: list[Path], shape: tuple[int, ...]) -> Tensor:
    """A parameter from its ranks' files, each of which says which slices of the whole it holds.

    Raises:
        UserError: another shape than `shape`, or the files do not fill it.
    """
    whole, filled = None, 0
    for path in files:
        with safe_open(path, "pt") as file:
            data, metadata = file.get_tensor("data"), file.metadata() or {}
        if whole is None:
            whole = torch.empty(shape, dtype=data.dtype)
        pairs = metadata.get("local_global_slices_pairs", _pairs(data.shape))
        for local, place in _slices(pairs):
            part, room = data[local], whole[place]
            if part.shape != room.shape:
                found = f"a part of {tuple(part.shape)} for {tuple(room.shape)} of {shape}"
                raise UserError(found, "its model_config.json is of another model: name another checkpoint", path)
            room.copy_(part)
            filled += part.numel()
    assert whole is not None
    if filled != whole.numel():
        found = f"its files hold {filled:,} of {whole.numel():,} values"
        raise UserError(found, "a rank's file is missing: name a whole checkpoint", files[0].parent)
    return whole


def _slices(pairs: str) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Nanotron's text for slices, `local#global;…`, each `start,stop,step|…` by dimension."""
    for pair in pairs.split(";"):
        local, place = (
            tuple(slice(*(None if n == "None" else int(n) for n in one.split(","))) for one in side.split("|"))
            for side in pair.split("#")
        )
        yield local, place


def _pairs(shape: Iterable[int]) -> str:
    """The text for a file that holds the whole."""
    everything = "|".join(f"0,{size},None" for size in shape)
    return f"{everything}#{everything}"


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> torch.dtype:
    """Writes model.safetensors, or numbered files and their index; returns the tensors' dtype."""
    shards: list[list[str]] = []
    total, dtype = 0, torch.float32
    for shard in _batches(tensors, shard_bytes):
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        dtype = next(iter(shard.values())).dtype
    count = len(shards)
    names = (
        [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)] if count > 1 else ["model.safetensors"]
    )
    for n, name in enumerate(names):
        (folder / f"{n}.safetensors").rename(folder / name)
    if count > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return dtype


def _batches(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most `limit` bytes, or of one tensor."""
    batch: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > limit:
            yield batch
            batch.clear()  # the receiver still has it
        batch[name] = tensor
    yield batch


def _write_settings(model: Llama, vocabulary: Vocabulary, dtype: torch.dtype, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's two files, as the installed transformers reads them."""
    from transformers import GenerationConfig, LlamaConfig

    shape = asdict(model)
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    ends = {"bos_token_id": vocabulary.end_of_text_id, "eos_token_id": vocabulary.end_of_text_id}
    config = LlamaConfig(
        **shape, **ends, rope_parameters=rope, hidden_act="silu", attention_bias=False, mlp_bias=False, dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    both = {**read_json(folder / "config.json"), "rope_theta": model.rope_theta}
    write_json(folder / "config.json", both)  # transformers 4 takes 10,000 where it finds rope_parameters alone
    GenerationConfig(**ends).save_pretrained(folder)
    vocabulary.write(folder, model.max_position_embeddings)


# To Nanotron


def to_nanotron(model: Path, out: Path, *, progress: Console | None = None) -> Path:
    """Writes a transformers Llama as a checkpoint of step 0 in the folder `out`, which is there when it is complete.

    It holds weights at tp = pp = 1, which Nanotron's `init_method.path` takes in any topology, and the tokenizer.

    Args:
        model: a folder with config.json, safetensors files and tokenizer.json.
        progress: where a bar is shown.

    Returns:
        `out`.

    Raises:
        UserError: no model, or one that Nanotron's Llama cannot represent; there is something at `out` already.
        OSError: the disk is full; nothing is left at `out`.
    """
    if out.exists():
        raise UserError("there is something here already", "name another folder, or delete this one", out)
    if (model / MANIFEST).is_file():
        fix = "name a model in transformers' format, or leave --to nanotron out"
        raise UserError("this is a checkpoint of Nanotron already", fix, model)
    llama = Llama.of_transformers(model)
    vocabulary = Vocabulary.beside(model)
    vocabulary.check_size(llama.vocab_size)
    files = find_tensors(model, llama)
    with _whole(out, sum(path.stat().st_size for path in set(files.values()))) as folder:
        partial = partial_folder(folder, 0)
        write_json(partial / "model_config.json", _nanotron_config(llama, vocabulary))
        for parameter in _tracked(llama.parameters, progress):
            _write_parameter(parameter, parameter.join(read_tensor(files, name) for name in parameter.names), partial)
        copy_tokenizer(model, partial)
        name, topology = model.resolve().name, Topology(dp=1, tp=1, pp=1, zero_stage=0)
        commit(partial, recipe=name, stage=CONVERTED, step=0, plan="", topology=topology).rename(out)
    return out


def find_tensors(model: Path, llama: Llama) -> dict[str, Path]:
    """The safetensors file of each tensor of a transformers model.

    Raises:
        UserError: a tensor is missing, of another shape, quantised, or not one of a Llama.
    """
    shapes = {name: shape for parameter in llama.parameters for name, shape in parameter.shapes().items()}
    index = model / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    files: dict[str, Path] = {}
    for path in (model / name for name in sorted(names)):
        for name, shape, dtype in _header(path):
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and llama.tie_word_embeddings):
                continue  # of older versions: follows from the configuration
            found = f"{name} of {dtype} {shape} where config.json calls for {shapes.get(name, 'no such tensor')}"
            if shapes.get(name) != shape or dtype not in ("F32", "BF16", "F16"):
                raise UserError(found, "name a plain LlamaForCausalLM's folder", path)
            files[name] = path
    if missing := [name for name in shapes if name not in files]:
        raise UserError(f"the tensor {missing[0]} is missing", "download the whole model", model)
    return files


def _header(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of each tensor of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no mapping
            return [(name, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()]
    except (OSError, SafetensorError) as error:
        fix = "name a model's folder with whole safetensors files"
        raise UserError(f"cannot be read ({error})", fix, path) from None


def read_tensor(files: dict[str, Path], name: str) -> Tensor:
    """One tensor; its file is open for no longer, so that no more of it stays in memory."""
    with safe_open(files[name], "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _write_parameter(parameter: Parameter, whole: Tensor, checkpoint: Path) -> None:
    """The file that Nanotron's only rank would write."""
    rank, metadata = "", {}
    if parameter.columns is not None:
        rank = "_pp-rank-0-of-1_tp-rank-0-of-1"
        shape = tuple(whole.shape)
        metadata = {"version": VERSION, "unsharded_shape": str(shape), "local_global_slices_pairs": _pairs(shape)}
    path = checkpoint / "model" / "model" / parameter.folder / f"model_weight{rank}.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"data": whole}, path, metadata=metadata)


def _nanotron_config(llama: Llama, vocabulary: Vocabulary) -> dict[str, Any]:
    """The model_config.json of engine/model.py's RopeLlamaConfig."""
    return {
        "bos_token_id": vocabulary.end_of_text_id, "eos_token_id": vocabulary.end_of_text_id, "hidden_act": "silu",
        "is_llama_config": True, "pad_token_id": None, "pretraining_tp": 1, "rope_scaling": None, "use_cache": True,
        **asdict(llama), "is_rope_llama_config": True,
    }  # fmt: skip


def check_start(checkpoint: Path, run: Run) -> None:
    """Raises UserError if a run cannot start from a checkpoint's weights: damaged, another shape, another tokenizer."""
    Checkpoint.load(checkpoint).verify()
    llama, recipe = Llama.of_checkpoint(checkpoint), run.recipe
    model = recipe.model
    wanted = {
        "hidden_size": model.hidden, "intermediate_size": model.ffn, "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings, "rms_norm_eps": model.norm_eps, "rope_theta": model.rope_theta,
    }  # fmt: skip
    for key, value in wanted.items():
        if (there := getattr(llama, key)) != value:
            found = f"a model of {key} {there}, where the recipe {recipe.name} has {value}"
            raise UserError(found, "change the recipe's model, or start from another one", checkpoint)
    own = checkpoint / "tokenizer.json"
    if own.is_file() and sha256_of(own) != sha256_of(run.tokenizer):
        found = f"not the tokenizer of the run, {run.tokenizer}"
        raise UserError(found, "tokenise the data with the model's own tokenizer", own)


# Both ways


@contextmanager
def _whole(out: Path, needed: int) -> Iterator[Path]:
    """A folder to write `out` in, of about `needed` bytes; it becomes `out`, unless its writer has put that there."""
    partial = out.with_name(out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        check_space(partial, needed)
        yield partial
        if not out.exists():
            partial.rename(out)
    except SafetensorError as error:
        raise OSError(f"{out} could not be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(out.parent)


def _tracked(parameters: list[Parameter], console: Console | None) -> Iterable[Parameter]:
    return track(parameters, "converting", console=console, transient=True, disable=console is None)


def _settle(folder: Path, files: list[FileEntry]) -> None:
    """Makes the files' content durable, and readable for whom config.json is: safetensors writes for its owner only."""
    for entry in files:
        shutil.copymode(folder / "config.json", folder / entry.name)
        with open(folder / entry.name, "rb") as file:
            os.fsync(file.fileno())
