"""The real training: killed, stopped, resumed, on full disks and on other numbers of processes.

What is compared is the loss of every step, to the last bit. The undisturbed run is shared by the tests.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recipes.audit import audit
from recipes.engine.checkpoint import latest, partial_folder, steps
from recipes.files import read_lines
from recipes.plan import learning_rate
from recipes.run import Run
from tests.engine.tiny_run import (
    children,
    environment,
    kill,
    losses,
    make_run,
    metrics,
    start,
    state,
    train,
    trained,
    wait_for,
)

pytestmark = pytest.mark.slow

FLOAT32 = {"model": {"dtype": "float32"}, "optimizer": {"accumulate_grad_in_fp32": False}}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both stages in bf16 with fp32 accumulation, data parallel 2, from one end to the other."""
    run = make_run(tmp_path_factory.mktemp("undisturbed"))
    for stage in ("stage1", "stage2"):
        train(run, stage, 2)
    return run


def copy_of(run: Run, folder: Path) -> Run:
    """A copy that a test may damage."""
    return Run.load(shutil.copytree(run.folder, folder / "run"))


def assert_same(run: Run, other: Run) -> None:
    """Same losses, norms, rates, tokens, ledger totals and final weights and moments, bit by bit."""
    for stage in ("stage1", "stage2"):
        for line, expected in zip(metrics(run, stage), metrics(other, stage), strict=True):
            for key in ("step", "tokens", "loss", "lr", "grad_norm"):
                assert line[key] == expected[key], (stage, line, expected)
        assert total(run, stage) == total(other, stage)
        heldout = [json.loads((r.stage_folder(stage) / "heldout.json").read_text()) for r in (run, other)]
        assert heldout[0] == heldout[1] or heldout[0] == {"start": {}, "end": {}}
    assert_same_tensors(run.checkpoints("stage2") / "23", other.checkpoints("stage2") / "23")


def assert_same_tensors(folder: Path, other: Path) -> None:
    """Same weights, same fp32 weights and moments. Files may differ: safetensors writes its header in any order."""
    names = sorted(p.relative_to(folder) for p in folder.rglob("*.safetensors"))
    assert len(names) == 14
    for name in names:
        assert torch.equal(load_file(folder / name)["data"], load_file(other / name)["data"])
    (mine,), (theirs,) = (sorted((f / "optimizer").glob("*.pt")) for f in (folder, other))
    one, two = torch.load(mine), torch.load(theirs)
    for key, tensor in one["gradient_accumulator"].items():
        assert torch.equal(tensor, two["gradient_accumulator"][key])
    for index, moments in one["state"].items():
        assert all(torch.equal(moments[key], two["state"][index][key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def total(run: Run, stage: str) -> tuple[dict[str, int], int]:
    """Tokens by source and digest of a whole ledger."""
    lines = read_lines(run.stage_folder(stage) / "ledger.jsonl")
    tokens = {name: sum(line["tokens"][name] for line in lines) for name in lines[0]["tokens"]}
    return tokens, sum(int(line["digest"], 16) for line in lines) % 2**64


def test_an_undisturbed_run_trains_and_writes_what_it_should(undisturbed: Run) -> None:
    assert [steps(undisturbed.checkpoints(stage)) for stage in ("stage1", "stage2")] == [[4, 8, 12], [16, 20, 23]]
    for stage in ("stage1", "stage2"):
        assert state(undisturbed, stage) | {"reason": None} == {
            "stage": stage, "state": "finished", "step": undisturbed.plan.stage(stage).end_step, "exit_code": 0,
            "reason": None,
        }  # fmt: skip
        for line in metrics(undisturbed, stage):
            assert set(line["seconds"]) == {"data", "step", "checkpoint"} and line["mfu"] is None
            assert (line["seconds"]["checkpoint"] > 0) == (line["step"] in (4, 8, 12, 16, 20, 23))
            assert line["tokens_per_s"] > 0 and line["grad_norm"] > 0
    assert losses(undisturbed, "stage2")[23] < losses(undisturbed, "stage1")[1] - 1


def test_each_step_has_the_plans_rate_also_after_a_resume(undisturbed: Run) -> None:
    for stage in undisturbed.plan.stages:
        lines = metrics(undisturbed, stage.name)
        assert [line["step"] for line in lines] == list(range(stage.start_step + 1, stage.end_step + 1))
        planned = [learning_rate(stage.schedule, line["step"]) for line in lines]
        assert [line["lr"] for line in lines] == pytest.approx(planned, rel=1e-12)


def test_tokens_are_counted_right_across_a_change_of_sequence_length(undisturbed: Run) -> None:
    for stage in ("stage1", "stage2"):
        assert all(line["tokens"] == 256 * line["step"] for line in metrics(undisturbed, stage))
    done = json.loads((undisturbed.checkpoints("stage2") / "23" / "checkpoint_metadata.json").read_text())
    assert done["metas"] == {"last_train_step": 23, "consumed_train_samples": 12 * 8 + 11 * 4}


def test_the_ledger_is_the_plan_down_to_the_content_of_every_sample(undisturbed: Run) -> None:
    for found in audit(undisturbed, digests=True):
        assert found.complete and not found.problems and found.realised == found.planned


def test_heldout_loss_falls(undisturbed: Run) -> None:
    for stage in ("stage1", "stage2"):
        heldout = json.loads((undisturbed.stage_folder(stage) / "heldout.json").read_text())
        for domain in ("web", "code"):
            assert heldout["end"][domain]["loss"] < heldout["start"][domain]["loss"]
            length = undisturbed.plan.stage(stage).sequence_length
            assert heldout["end"][domain]["tokens"] == 699 // length * length


def test_the_stage_has_its_own_rope_theta(undisturbed: Run, tmp_path: Path) -> None:
    run = copy_of(undisturbed, tmp_path)
    code = f"""
from recipes.train import become_single_process
become_single_process()
from pathlib import Path
from recipes.run import Run
from recipes.engine.checkpoint import Topology
from recipes.engine.compat import RotaryEmbedding
from recipes.engine.config import nanotron_config, write_config
from recipes.engine.trainer import StageTrainer
run = Run.load({str(run.folder)!r})
stage, checkpoints = run.plan.stages[1], run.checkpoints("stage2")
config = nanotron_config(run.recipe, stage, Topology(1, 1, 1, 0), checkpoints, resume=checkpoints / "20")
write_config(run.folder / "config.yaml", config)
trainer = StageTrainer(run, stage, run.folder / "config.yaml", lambda: False)
bases = [module.base for module in trainer.model.modules() if isinstance(module, RotaryEmbedding)]
print(bases, trainer.model_config.max_position_embeddings, type(trainer.model_config).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == "[50000.0, 50000.0] 64 RopeLlamaConfig\n", done.stderr


def test_killed_at_a_random_step_and_in_the_middle_of_a_checkpoint_it_ends_the_same(
    undisturbed: Run, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    step = random.randint(1, 11)
    print(f"killed after step {step}")
    process = start(run, "stage1", 2)
    wait_for(trained(run, "stage1", step), process)
    kill(process)
    train(run, "stage1", 2)
    kill_inside_a_checkpoint(run, "stage2")
    out, _ = train(run, "stage2", 2)
    assert "stage2: steps" in out
    assert not list(run.folder.glob("*/checkpoints/*.partial"))
    assert_same(run, undisturbed)


def kill_inside_a_checkpoint(run: Run, stage: str) -> None:
    """Starts training and kills it while the folder of its second checkpoint is unfinished."""
    partial = partial_folder(run.checkpoints(stage), 20)
    process = start(run, stage, 2)
    wait_for(partial.exists, process)
    workers = children(process.pid)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    assert partial.exists()
    kill(process)
    assert partial.exists() and steps(run.checkpoints(stage)) == [16]


def test_training_goes_on_while_a_checkpoint_is_written_and_a_kill_then_loses_only_that_one(
    undisturbed: Run, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    code = f"""
import time
from pathlib import Path
import recipes.train as train
train.become_single_process()
from recipes.run import Run
from recipes.engine.snapshot import Snapshot
run, write, written = Run.load({str(run.folder)!r}), Snapshot.write, []
Snapshot.write = lambda self: written.append(write(self)) if not written else time.sleep(1000)
stop, word = train.StopRequest(), train.first_word(run.folder, "stage1")
train.train(run, run.plan.stage("stage1"), Path(word["config"]), stop)
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), text=True, stderr=subprocess.PIPE)
    wait_for(trained(run, "stage1", 11), process)
    assert steps(run.checkpoints("stage1")) == [4] and partial_folder(run.checkpoints("stage1"), 8).is_dir()
    assert max(losses(run, "stage1")) == 11, "the next checkpoint waits"
    kill(process)
    for stage in ("stage1", "stage2"):
        out, _ = train(run, stage)
        assert stage == "stage2" or "steps 5 to 12, after" in out
    assert_same(run, undisturbed)


def test_stopped_on_one_process_and_continued_on_two_it_ends_the_same(undisturbed: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(run.folder / "data" / "heldout")
    process = start(run, "stage1")
    wait_for(trained(run, "stage1", 5), process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate()
    assert process.returncode == 75, err
    stopped = state(run, "stage1")
    assert (stopped["state"], stopped["exit_code"], stopped["reason"]) == ("stopped", 75, "SIGUSR1")
    assert stopped["step"] == steps(run.checkpoints("stage1"))[-1] == max(losses(run, "stage1")) < 12
    train(run, "stage1", 2)
    train(run, "stage2", 2)
    assert_same(run, undisturbed)
    assert [found.problems for found in audit(run, digests=True)] == [(), ()]


def test_a_signal_to_one_worker_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, stage1={"end_step": 2000}, stage2={"end_step": 2001})
    process = start(run, "stage1", 2)
    wait_for(trained(run, "stage1", 2), process)
    os.kill(children(process.pid)[1], signal.SIGUSR1)
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert err.count("exitcode  : 75") == 2 or "exitcode: 75" in err, err
    stopped = state(run, "stage1")
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 75)
    checkpoint, passed_over = latest(run.checkpoints("stage1"))
    assert checkpoint is not None and checkpoint.step == stopped["step"] == max(losses(run, "stage1"))
    assert not passed_over


def test_a_worker_that_outlives_torchrun_stops_and_the_next_start_waits_for_it(tmp_path: Path) -> None:
    endless = {"checkpoints": {"interval": 10_000}}
    run = make_run(tmp_path, endless, stage1={"end_step": 2000}, stage2={"end_step": 2001})
    process = start(run, "stage1", 1)
    wait_for(trained(run, "stage1", 2), process)
    again = start(run, "stage1")
    assert again.stdout is not None
    assert again.stdout.readline() == "another process trains this stage; waiting for it to end\n"
    process.send_signal(signal.SIGUSR1)  # torchrun dies of it
    _, err = process.communicate()
    stopped = re.fullmatch(r"stage1 stopped at step (\d+): SIGTERM", err.splitlines()[-1])
    assert stopped, err
    first = int(stopped[1])
    wait_for(lambda: max([0, *losses(run, "stage1")]) > first, again)
    again.send_signal(signal.SIGINT)
    out, err = again.communicate()
    assert again.returncode == 75 and f"steps {first + 1:,} to 2,000, after" in out, out + err
    assert state(run, "stage1")["reason"] == "SIGINT"


def limit(process: subprocess.Popen[str], size: int) -> None:
    """From now on the process cannot write beyond `size` bytes of any file: to it, the disk is full."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))


def assert_not_written(process: subprocess.Popen[str], run: Run) -> None:
    """The process ended with the code, state and message of a full disk; the checkpoint of step 4 is there alone."""
    out, err = process.communicate()
    assert process.returncode == 74, out + err
    assert err.count("\n") == 1 and "stage1 failed at step 4: could not write " in err, err
    failed = state(run, "stage1")
    assert (failed["state"], failed["step"], failed["exit_code"]) == ("failed", 4, 74)
    assert "bytes are free" in failed["reason"]
    assert [p.name for p in run.checkpoints("stage1").iterdir()] == ["4"]


def test_a_full_disk_loses_nothing(undisturbed: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    process = start(run, "stage1")
    wait_for((run.checkpoints("stage1") / "4").exists, process)
    limit(process, (run.stage_folder("stage1") / "metrics.jsonl").stat().st_size + 100)  # half a line of metrics
    assert_not_written(process, run)
    process = start(run, "stage1")
    wait_for(lambda: state(run, "stage1")["state"] == "training", process)
    limit(process, 100_000)  # less than the optimizer's file
    assert_not_written(process, run)
    for stage in ("stage1", "stage2"):
        train(run, stage)
    assert_same(run, undisturbed)


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(undisturbed: Run, tmp_path: Path) -> None:
    run = copy_of(undisturbed, tmp_path)
    optimizer = next((run.checkpoints("stage2") / "23" / "optimizer").glob("*.pt"))
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    out, _ = train(run, "stage2", 2)
    assert "passed over, now 23.damaged: " in out and "checksum" in out and "steps 21 to 23, after" in out
    assert_same(run, undisturbed)
    assert steps(run.checkpoints("stage2")) == [16, 20, 23]
    out, _ = train(run, "stage2")
    assert "stage2 is complete" in out


def refusal(run: Run, stage: str, processes: int | None = None) -> str:
    """The one message of a start that is refused with exit code 2; torchrun adds its own lines, and returns 1."""
    process = start(run, stage, processes)
    out, err = process.communicate()
    assert process.returncode == (1 if processes else 2), out + err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and (processes or err.count("\n") == 1), err
    return lines[0]


def test_zero_1_trains_the_same_but_on_the_same_number_of_processes_only(undisturbed: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path, {"optimizer": {"zero_stage": 1}})
    train(run, "stage1", 2)
    message = refusal(run, "stage2")
    assert "written by 2 data-parallel ranks under ZeRO 1, to be resumed by 1" in message
    assert "Start 2 processes" in message
    assert losses(run, "stage1") == losses(undisturbed, "stage1")


def test_wrong_input_is_refused_with_one_message(undisturbed: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path, {"optimizer": {"zero_stage": 1}})
    assert "stage2 starts from step 12 of stage1, but stage1 has no checkpoint" in refusal(run, "stage2")
    assert (state(run, "stage2")["state"], state(run, "stage2")["exit_code"]) == ("failed", 2)
    assert "tiny has no stage 'stage3'" in refusal(run, "stage3")
    assert "8 samples a step do not divide" in refusal(run, "stage1", 3)
    shutil.copytree(undisturbed.checkpoints("stage1"), run.checkpoints("stage1"))
    assert "written with zero_stage 0, to be resumed with 1" in refusal(run, "stage2")
    tokenizer = run.tokenizer.read_text()
    run.tokenizer.write_text(tokenizer.replace("word5", "word_5", 1))
    assert "made with tokenizer" in refusal(run, "stage1")
    run.tokenizer.write_text(tokenizer)
    tokens = run.data("prose") / "00000.ds"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert "00000.ds: 5,998 bytes where the manifest says 6,000" in refusal(run, "stage1")
    (run.folder / "plan.json").write_text("{}")
    assert "the frozen recipe no longer gives this plan" in refusal(run, "stage1")


@pytest.mark.parametrize(
    ("started_with", "workers", "share"),
    [({}, 1, 1), ({}, 2, 2), ({"OMP_NUM_THREADS": "1"}, 1, None)],
    ids=["all-cores", "half", "chosen"],
)
def test_workers_share_the_cores_unless_a_person_said_otherwise(
    started_with: dict[str, str], workers: int, share: int | None
) -> None:
    worker = "import recipes.train as t, torch; t.set_threads(); print(torch.get_num_threads())"
    torchrun = f"""
import os, subprocess, sys
os.environ |= {{"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "{workers}"}}
subprocess.run([sys.executable, "-c", {worker!r}], check=True)
"""
    variables = environment()
    del variables["OMP_NUM_THREADS"]
    done = subprocess.run(
        [sys.executable, "-c", torchrun], env=variables | started_with, capture_output=True, text=True
    )
    cores = len(os.sched_getaffinity(0))
    assert done.stdout == f"{max(1, cores // share) if share else 1}\n", done.stderr


@pytest.fixture(scope="session")
def float32(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one process in fp32."""
    run = make_run(tmp_path_factory.mktemp("float32"), FLOAT32 | {"parallelism": {"dp": 1}, **one_rank()})
    train(run, "stage1")
    return losses(run, "stage1")


def one_rank() -> dict[str, Any]:
    return {"batch": {"accumulation": 2}}


@pytest.mark.parametrize(
    "parallelism",
    [{"dp": 1, "tp": 2, "tp_mode": "REDUCE_SCATTER"}, {"dp": 1, "pp": 2, "pp_engine": "1f1b"}],
    ids=["tp2", "pp2"],
)
def test_two_parts_of_a_model_train_as_the_whole(
    float32: dict[int, float], tmp_path: Path, parallelism: dict[str, Any]
) -> None:
    run = make_run(tmp_path, FLOAT32 | {"parallelism": parallelism} | one_rank())
    out, _ = train(run, "stage1", 2)
    assert "creating step 0" in out
    assert losses(run, "stage1") == pytest.approx(float32, abs=1e-5)
    assert [found.problems for found in audit(run, digests=True)] == [()]
    process = start(run, "stage2")
    _, err = process.communicate()
    assert process.returncode == 2 and "do not divide" in err
