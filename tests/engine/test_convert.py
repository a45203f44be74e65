"""Conversion of real Nanotron checkpoints, there and back, against the real transformers."""

from __future__ import annotations

import io
import json
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.engine.checkpoint import Checkpoint
from recipes.engine.convert import check_start, to_nanotron, to_transformers
from recipes.engine.layout import Llama, halves, neighbours
from recipes.errors import UserError
from recipes.files import checksum, write_json
from recipes.run import Run
from tests.engine.logits import IDS
from tests.engine.tiny_run import environment, make_run, start

RUNS: dict[str, tuple[float, int, int, bool, int]] = {
    "10k-tp2-tied-grouped": (10_000.0, 2, 1, True, 2),
    "10k-tp1-untied-multi": (10_000.0, 1, 1, False, 4),
    "130k-tp2-untied-multi": (130_000.0, 2, 1, False, 4),
    "130k-pp2-tied-multi": (130_000.0, 1, 2, True, 4),
    "130k-tp1-untied-grouped": (130_000.0, 1, 1, False, 2),
}
"""RoPE theta, tp, pp, tied, key-value heads of 4: every pair of theta, tp, tied and heads, and one pipeline."""


def tiny(folder: Path, theta: float, tp: int, pp: int, tied: bool, kv_heads: int) -> Run:
    """A run in fp32, nothing trained yet."""
    recipe = {
        "model": {"dtype": "float32", "rope_theta": theta, "tied_embeddings": tied, "kv_heads": kv_heads},
        "optimizer": {"accumulate_grad_in_fp32": False}, "parallelism": {"dp": 1, "tp": tp, "pp": pp},
        "batch": {"accumulation": 2}, "tokenizer": {"end_of_text": "word0"},
    }  # fmt: skip
    return make_run(folder, recipe, stage1={"end_step": 2}, stage2={"end_step": 23})


@dataclass
class Case:
    """A trained checkpoint, its conversion, and the conversion's conversion back."""

    run: Run
    checkpoint: Path
    model: Path
    back: Path
    tp: int
    """Of the ranks that `logits` and `logits_back` are computed on."""
    logits: Tensor
    logits_back: Tensor


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All of `RUNS`, trained for two steps at the same time."""
    root = tmp_path_factory.mktemp("convert")
    runs = {name: tiny(root / name, *settings) for name, settings in RUNS.items()}
    processes = [
        start(run, "stage1", tp * pp if tp * pp > 1 else None)
        for run, (_, tp, pp, _, _) in zip(runs.values(), RUNS.values(), strict=True)
    ]
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    made: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        checkpoint = run.checkpoints("stage1") / "2"
        model = to_transformers(checkpoint, root / name / "model")
        back = to_nanotron(model, root / name / "back")
        made[name] = {"run": run, "checkpoint": checkpoint, "model": model, "back": back}
    logits = nanotron_logits(root, made)
    return {
        name: Case(**case, tp=RUNS[name][1], logits=logits[name], logits_back=logits[f"{name}-back"])
        for name, case in made.items()
    }


def nanotron_logits(root: Path, made: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Nanotron's logits of the checkpoints, by name, and of those converted back, by `<name>-back`."""
    result: dict[str, Tensor] = {}
    processes = []
    for tp in (1, 2):
        jobs = {}
        for name, case in made.items():
            if RUNS[name][1] == tp:
                jobs[name] = [str(case["run"].folder), str(case["checkpoint"])]
                jobs[f"{name}-back"] = [str(case["run"].folder), str(case["back"])]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if tp == 2 else []
        command = [sys.executable, *torchrun, "-m", "tests.engine.logits", str(root / f"logits{tp}"), json.dumps(jobs)]
        processes.append(subprocess.Popen(command, env=environment(), text=True, stderr=subprocess.PIPE))
    for tp, process in zip((1, 2), processes, strict=True):
        _, err = process.communicate()
        assert process.returncode == 0, err
        result |= torch.load(root / f"logits{tp}")
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_transformers_computes_what_nanotron_does(cases: dict[str, Case], name: str) -> None:
    from transformers import AutoModelForCausalLM

    case = cases[name]
    model, report = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": RUNS[name][0]}
    with torch.no_grad():
        logits = model(IDS).logits
    assert case.logits.shape == logits.shape == (2, 32, 512) and logits.std() > 0.1
    difference = (logits - case.logits).abs().max().item()
    print(f"{name}: {difference:.2e}")
    assert difference < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_nanotron_computes_the_same_bits_from_a_model_converted_back(cases: dict[str, Case], name: str) -> None:
    assert torch.equal(cases[name].logits_back, cases[name].logits)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a transformers model."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def parameters(checkpoint: Path) -> dict[Path, Tensor]:
    """All parameters of a checkpoint at tp 1, by their folder."""
    files = checkpoint.glob("model/**/*.safetensors")
    return {file.parent.relative_to(checkpoint): load_file(file)["data"] for file in files}


def assert_equal(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_there_and_back_is_bit_exact(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    case = cases[name]
    again = to_transformers(case.back, tmp_path / "again")
    assert_equal(tensors(again), tensors(case.model))
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (again / file).read_bytes() == (case.model / file).read_bytes()
    if case.tp == 1:
        assert_equal(parameters(case.back), parameters(case.checkpoint))
    ours, theirs = (json.loads((folder / "model_config.json").read_text()) for folder in (case.back, case.checkpoint))
    assert {**theirs, "bos_token_id": 0, "eos_token_id": 0} == ours
    check_start(case.back, case.run)


@pytest.mark.slow
def test_the_files_are_as_nanotron_writes_them(cases: dict[str, Case]) -> None:
    case = cases["130k-tp1-untied-grouped"]
    names = [sorted(p.relative_to(f) for p in f.glob("model/**/*.*")) for f in (case.back, case.checkpoint)]
    assert names[0] == names[1] and len(names[0]) == 15
    for name in names[0]:
        with safe_open(case.back / name, "pt") as ours, safe_open(case.checkpoint / name, "pt") as theirs:
            mine, other = ours.metadata() or {}, theirs.metadata() or {}
        assert mine.keys() == other.keys()
        assert all(mine[key] == other[key] for key in mine if key != "local_global_slices_pairs")


@pytest.mark.slow
def test_what_a_folder_in_transformers_format_holds(cases: dict[str, Case], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    case = cases["130k-pp2-tied-multi"]
    assert sorted(p.name for p in case.model.iterdir()) == [
        "config.json", "conversion.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert "lm_head.weight" not in tensors(case.model)
    config = json.loads((case.model / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"], config["eos_token_id"]) == ("float32", True, 0)
    assert config["max_position_embeddings"] == 32
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 130_000
    assert GenerationConfig.from_pretrained(case.model).eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.chat_template) == ("word0", 0, None)
    assert tokenizer.model_max_length == 32 and "token_type_ids" not in tokenizer("word7")
    assert tokenizer("word7")["input_ids"] == [7]
    assert (case.model / "tokenizer.json").read_bytes() == case.run.tokenizer.read_bytes()
    origin = json.loads((case.model / "conversion.json").read_text())
    assert origin["manifest"] == checksum(case.checkpoint / "manifest.json")
    assert (origin["recipe"], origin["stage"], origin["step"]) == ("tiny", "stage1", 2)


@pytest.mark.slow
def test_an_existing_conversion_is_kept_and_anything_else_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    case, other = cases["130k-pp2-tied-multi"], cases["10k-tp1-untied-multi"]
    out = shutil.copytree(case.model, tmp_path / "model")
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert to_transformers(case.checkpoint, out) == out
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(UserError, match="a conversion of tiny, stage1, step 2 is here already, of another"):
        to_transformers(other.checkpoint, out)
    (out / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes where the manifest says"):
        to_transformers(case.checkpoint, out)
    (out / "conversion.json").unlink()
    for convert, source in ((to_transformers, case.checkpoint), (to_nanotron, case.model)):
        with pytest.raises(UserError, match="there is something here already"):
            convert(source, out)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_large_models_are_sharded(cases: dict[str, Case], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    case = cases["130k-tp2-untied-multi"]
    out = to_transformers(case.checkpoint, tmp_path / "out", shard_bytes=150_000)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-00005.safetensors" for n in range(1, 6)]
    assert all((out / name).stat().st_size < 160_000 for name in files)
    assert_equal(tensors(out), tensors(case.model))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(out).values())
    assert {name: file for file in files for name in load_file(out / file)} == index["weight_map"]
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert_equal({name: loaded[name] for name in tensors(out)}, tensors(out))
    back = to_nanotron(out, tmp_path / "back")
    assert_equal(parameters(back), parameters(case.back))


def refuses(convert: Any, source: Path, out: Path, message: str, **options: Any) -> None:
    """One message, and nothing written."""
    with pytest.raises(UserError, match=message):
        convert(source, out, **options)
    assert not list(out.parent.glob(f"{out.name}*"))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_verify_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    run = Run.load(shutil.copytree(cases["10k-tp2-tied-grouped"].run.folder, tmp_path / "run"))
    checkpoint, out = run.checkpoints("stage1") / "2", tmp_path / "out"
    file = next(checkpoint.glob("model/**/qkv_proj/*tp-rank-1*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refuses(to_transformers, checkpoint, out, "checksum .* where the manifest says")
    file.unlink()
    refuses(to_transformers, checkpoint, out, "this file of the manifest is missing")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = [e for e in manifest["files"] if not e["name"].endswith(str(file.relative_to(checkpoint)))]
    write_json(checkpoint / "manifest.json", manifest)
    refuses(to_transformers, checkpoint, out, "qkv_proj: its files hold 4,096 of 8,192 values")
    (checkpoint / "manifest.json").unlink()
    refuses(to_transformers, checkpoint, out, "no complete checkpoint")


@pytest.mark.slow
def test_a_checkpoint_of_another_tokenizer_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    run = Run.load(shutil.copytree(cases["130k-pp2-tied-multi"].run.folder, tmp_path / "run"))
    checkpoint, out = run.checkpoints("stage1") / "2", tmp_path / "out"
    other = tmp_path / "other.json"
    other.write_text(run.tokenizer.read_text().replace('"word7"', '"seven"'))
    refuses(to_transformers, checkpoint, out, "not the tokenizer that .* was trained with", tokenizer=other)
    same = shutil.copy(run.tokenizer, tmp_path / "same.json")
    assert to_transformers(checkpoint, tmp_path / "fine", same).is_dir()
    shutil.copy(other, run.tokenizer)
    refuses(to_transformers, checkpoint, out, "made with tokenizer .*, but the recipe's, tokenizer.json, is")
    alone = Path(shutil.copytree(checkpoint, tmp_path / "alone"))
    refuses(to_transformers, alone, out, "there is no such file", tokenizer=tmp_path / "absent.json")
    refuses(to_transformers, alone, out, "lies in no run: its tokenizer is unknown")
    refuses(to_transformers, alone, out, "no token '<|endoftext|>'".replace("|", r"\|"), tokenizer=same)
    words = json.loads(same.read_text())
    words["model"]["vocab"] |= {"<|endoftext|>": 512}
    other.write_text(json.dumps(words))
    refuses(to_transformers, alone, out, "token ids up to 512, but the checkpoint has 512", tokenizer=other)
    words["model"]["vocab"] = {f"word{i}": i for i in range(300)} | {"<|endoftext|>": 300}
    other.write_text(json.dumps(words))
    refuses(to_transformers, alone, out, "301 tokens for a checkpoint of 512 embeddings", tokenizer=other)
    words["model"]["vocab"] = {f"word{i}": i for i in range(500)} | {"<|endoftext|>": 500}
    other.write_text(json.dumps(words))
    assert to_transformers(alone, out, other).is_dir()


@pytest.mark.slow
def test_a_run_does_not_start_from_what_does_not_fit(cases: dict[str, Case], tmp_path: Path) -> None:
    case, run = cases["130k-pp2-tied-multi"], cases["130k-tp1-untied-grouped"].run
    with pytest.raises(UserError, match="a model of num_key_value_heads 4, where the recipe tiny has 2"):
        check_start(case.back, run)
    model = Path(shutil.copytree(cases["130k-tp1-untied-grouped"].model, tmp_path / "model"))
    words = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(words.replace('"word7"', '"seven"'))
    with pytest.raises(UserError, match="not the tokenizer of the run"):
        check_start(to_nanotron(model, tmp_path / "back"), run)


CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "rope_theta": 50000,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "torch_dtype": "bfloat16",
}  # fmt: skip
"""As older versions of transformers wrote it: published models have such files."""


def write_model(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A transformers model of random weights, with a tokenizer; `changes` are made to its config.json alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIG | {k: v for k, v in changes.items() if k in SHAPE})
    shapes = {n: shape for p in Llama.of_transformers(folder).parameters for n, shape in p.shapes().items()}
    save_file({name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG | changes)
    words = {f"word{i}": i for i in range(63)} | {"<|endoftext|>": 63}
    Tokenizer(WordLevel(words, unk_token="word1")).save(str(folder / "tokenizer.json"))
    return folder


SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")


def test_a_published_model_in_bf16_survives_there_and_back(tmp_path: Path) -> None:
    model = write_model(tmp_path / "published")
    checkpoint = to_nanotron(model, tmp_path / "checkpoint")
    manifest = Checkpoint.load(checkpoint)
    manifest.verify()
    assert (manifest.recipe, manifest.stage, manifest.step) == ("published", "converted", 0)
    assert not list(tmp_path.glob("*.partial"))
    config = json.loads((checkpoint / "model_config.json").read_text())
    assert config["rope_theta"] == 50000.0 and config["eos_token_id"] == 63
    bar = io.StringIO()
    again = to_transformers(checkpoint, tmp_path / "again", progress=Console(file=bar, force_terminal=True))
    assert "converting" in bar.getvalue()
    assert_equal(tensors(again), tensors(model))
    settings = json.loads((again / "config.json").read_text())
    assert (settings["dtype"], settings["eos_token_id"]) == ("bfloat16", 63)
    plain = (model / "config.json").stat().st_mode
    assert {p.stat().st_mode for f in (checkpoint, again) for p in f.rglob("*") if p.is_file()} == {plain}


def test_what_older_files_hold_too_much_is_left_out(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    write_json(model / "config.json", CONFIG | {"tie_word_embeddings": True})
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors(model) | more, model / "model.safetensors")
    checkpoint = to_nanotron(model, tmp_path / "checkpoint")
    expected = tensors(model)
    del expected["lm_head.weight"], expected[next(iter(more))]
    assert_equal(tensors(to_transformers(checkpoint, tmp_path / "again")), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is linear"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is"),
        ({"num_hidden_layers": 3}, r"the tensor model.layers.2.* is missing"),
        ({"num_key_value_heads": 4}, r"k_proj.weight of BF16 \(16, 32\) where config.json calls for \(32, 32\)"),
        ({"num_hidden_layers": 1}, r"calls for no such tensor"),
        ({"vocab_size": 60}, "token ids up to 63, but the checkpoint has 60"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_model_that_nanotron_cannot_represent_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = write_model(tmp_path / "model")
    write_json(model / "config.json", CONFIG | change)
    refuses(to_nanotron, model, tmp_path / "out", message)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    half = write_model(tmp_path / "half", torch.float16)
    to_nanotron(half, tmp_path / "half-precision")
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors(half).items()}
    save_file(eight, half / "model.safetensors")
    refuses(to_nanotron, half, out, "of F8_E4M3")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    refuses(to_nanotron, model, out, "model.safetensors: cannot be read")
    (model / "model.safetensors").unlink()
    refuses(to_nanotron, model, out, "model.safetensors: cannot be read")
    (model / "tokenizer_config.json").write_text("{")
    refuses(to_nanotron, model, out, "tokenizer_config.json: not JSON")
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer.json").unlink()
    refuses(to_nanotron, model, out, "tokenizer.json: cannot be read as a tokenizer")
    refuses(to_nanotron, tmp_path, out, "no transformers model")
    refuses(to_transformers, model, out, "in transformers' format already. Add --to nanotron")
    refuses(
        to_nanotron, tmp_path / "half-precision", out, "a checkpoint of Nanotron already. .* leave --to nanotron out"
    )
    refuses(to_transformers, tmp_path, out, "no complete checkpoint")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    checkpoint = to_nanotron(model, tmp_path / "checkpoint")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for convert, source in ((to_nanotron, model), (to_transformers, checkpoint)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # less than a matrix: to it, the disk is full
        try:
            with pytest.raises(OSError, match="could not be written"):
                convert(source, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    with pytest.raises(OSError, match="free"):
        to_nanotron(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@given(heads=st.integers(1, 9), pairs=st.integers(1, 9), columns=st.integers(1, 3))
def test_the_orders_of_rows_are_inverse(heads: int, pairs: int, columns: int) -> None:
    w = torch.arange(heads * pairs * 2 * columns).view(-1, columns)
    assert torch.equal(neighbours(halves(w, heads), heads), w)
    assert torch.equal(halves(neighbours(w, heads), heads), w)
    per_head = halves(w, heads).view(heads, 2, pairs, columns)
    assert torch.equal(per_head[:, 0], w.view(heads, -1, columns)[:, 0::2])
    assert torch.equal(per_head[:, 1], w.view(heads, -1, columns)[:, 1::2])


PEAK = """
import re, sys
from pathlib import Path
import transformers
from transformers import GenerationConfig, LlamaConfig
from recipes.engine.convert import to_nanotron, to_transformers
def kib(what):
    return int(re.search(what + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = kib("VmRSS")
{"nanotron": to_nanotron, "transformers": to_transformers}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
print((kib("VmHWM") - before) * 1024)
"""
"""The peak over what was resident before; ru_maxrss would have begun with that of the parent process."""


@pytest.mark.slow
def test_memory_stays_below_twice_the_model(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "vocab_size": 16384}
    model = write_model(tmp_path / "model", **shape)
    size = (model / "model.safetensors").stat().st_size
    assert size > 200e6
    for to, source, out in (("nanotron", "model", "checkpoint"), ("transformers", "checkpoint", "again")):
        command = [sys.executable, "-c", PEAK, to, str(tmp_path / source), str(tmp_path / out)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        print(f"to {to}: {int(done.stdout) / size:.2f} times the model")
        assert int(done.stdout) < 2 * size
