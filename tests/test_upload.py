from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.engine.checkpoint import prune, steps
from recipes.errors import UserError
from recipes.run import Run
from recipes.state import lock
from recipes.upload import BEGUN, VARIABLE, check_target, file_system, start_upload, upload
from tests.checkpoints import write_checkpoint
from tests.hub import REPOSITORY, Hub

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that checkpoints are sent to."""
    monkeypatch.setenv(VARIABLE, f"file://{tmp_path}/there/")
    return tmp_path / "there" / "tiny" / "stage1"


def once(run: Run, there: Path) -> int:
    return upload(run, list(run.plan.stages), f"file://{there.parent.parent}")


def same(run: Run, there: Path, step: int) -> bool:
    """Whether the folder there holds the checkpoint's files, and nothing else but what was written first."""
    here = run.checkpoints("stage1") / str(step)
    files = {p.relative_to(here): p.read_bytes() for p in here.rglob("*") if p.is_file()}
    copies = {p.relative_to(there / str(step)): p.read_bytes() for p in (there / str(step)).rglob("*") if p.is_file()}
    copies.pop(Path(BEGUN))
    return files == copies


def test_checkpoints_kept_for_ever_and_the_newest_other_one_are_sent(tiny_run: Run, there: Path) -> None:
    for step in (10, 20, 23):
        write_checkpoint(tiny_run, "stage1", step)
    for step in (24, 25):
        write_checkpoint(tiny_run, "stage2", step)
    assert once(tiny_run, there) == 0
    assert same(tiny_run, there, 23) and [p.name for p in there.iterdir()] == ["23"]
    assert [p.name for p in (there.parent / "stage2").iterdir()] == ["25"]
    before = {p: p.stat().st_mtime_ns for p in there.rglob("*")}
    assert once(tiny_run, there) == 0
    assert {p: p.stat().st_mtime_ns for p in there.rglob("*")} == before


def test_a_pass_that_was_cut_off_goes_on_by_file(tiny_run: Run, there: Path) -> None:
    folder = write_checkpoint(tiny_run, "stage1", 10)
    assert once(tiny_run, there) == 0
    (there / "10" / "manifest.json").unlink()
    torn, missing, whole = (there / "10" / n for n in ("model/weights.bin", "optimizer/state.bin", "config.yaml"))
    torn.write_bytes(torn.read_bytes()[:50])
    missing.unlink()
    before = whole.stat().st_mtime_ns
    assert once(tiny_run, there) == 0
    assert same(tiny_run, there, 10) and whole.stat().st_mtime_ns == before and folder.is_dir()


def test_another_checkpoint_of_the_same_step_replaces_the_one_there(tiny_run: Run, there: Path) -> None:
    folder = write_checkpoint(tiny_run, "stage1", 10)
    assert once(tiny_run, there) == 0
    shutil.rmtree(folder)
    write_checkpoint(tiny_run, "stage1", 10)
    for name in ("config.yaml",):  # the same sizes, another content: as trained again after a rollback
        path = folder / name
        content = path.read_bytes()
        manifest = folder / "manifest.json"
        from recipes.files import checksum

        old = checksum(path)
        path.write_bytes(content.replace(b".", b",", 1))
        manifest.write_text(manifest.read_text().replace(old, checksum(path)))
    assert once(tiny_run, there) == 0
    assert same(tiny_run, there, 10)


def test_while_another_checkpoint_of_the_step_is_sent_the_old_one_does_not_count(
    tiny_run: Run, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tiny_run, "stage1", 10)
    assert once(tiny_run, there) == 0 and (there / "10" / "manifest.json").exists()
    write_checkpoint(tiny_run, "stage1", 10, size=200)
    system, _ = file_system(f"file://{there}")
    monkeypatch.setattr(type(system), "put_file", lambda *_: 1 / 0)
    assert once(tiny_run, there) == 1
    assert not (there / "10" / "manifest.json").exists()


def test_every_nth_checkpoint_is_sent(tiny_run: Run, there: Path) -> None:
    kept = tiny_run.recipe.checkpoints.model_copy(update={"keep_every": 10})
    tiny_run.__dict__["recipe"] = replace(tiny_run.recipe, checkpoints=kept)
    for step in (10, 15, 20, 22):
        write_checkpoint(tiny_run, "stage1", step)
    assert once(tiny_run, there) == 0
    assert sorted(path.name for path in there.iterdir()) == ["10", "20", "22"]


def test_a_target_that_fails_is_named_and_tried_again(
    tiny_run: Run, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tiny_run, "stage1", 10)
    write_checkpoint(tiny_run, "stage1", 23)
    there.parent.mkdir(parents=True)
    there.write_text("in the way")
    assert once(tiny_run, there) == 1
    out = capsys.readouterr().out
    assert "stage1 step 23: failed, the next pass tries again: " in out and out.count("\n") == 1
    assert steps(tiny_run.checkpoints("stage1")) == [10, 23]
    there.unlink()
    assert once(tiny_run, there) == 0
    assert same(tiny_run, there, 23)


def test_a_checkpoint_that_lacks_a_file_here_is_a_failure_and_not_a_copy(tiny_run: Run, there: Path) -> None:
    folder = write_checkpoint(tiny_run, "stage1", 23)
    (folder / "optimizer" / "state.bin").unlink()
    assert once(tiny_run, there) == 1
    assert not (there / "23" / "manifest.json").exists()


def test_retention_never_takes_what_is_kept_for_ever_sent_or_not(tiny_run: Run) -> None:
    for step in (10, 20, 23):
        write_checkpoint(tiny_run, "stage1", step)
    assert prune(tiny_run.checkpoints("stage1"), 1, 10, tiny_run.plan.stage("stage1").kept_steps) == []


def test_a_checkpoint_that_retention_takes_meanwhile_is_no_failure(
    tiny_run: Run, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tiny_run, "stage1", 10)
    system, _ = file_system(f"file://{there}")
    put = type(system).put_file

    def put_and_prune(self: object, here: str, path: str) -> None:
        put(self, here, path)
        if folder.exists():
            shutil.rmtree(folder)

    monkeypatch.setattr(type(system), "put_file", put_and_prune)
    assert once(tiny_run, there) == 0
    assert "failed" not in capsys.readouterr().out and not (there / "10" / "manifest.json").exists()


def test_a_target_that_keeps_nothing_is_not_sent_to_for_ever(
    tiny_run: Run, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tiny_run, "stage1", 23)
    monkeypatch.setattr("recipes.upload._is_there", lambda *_: False)
    assert once(tiny_run, there) == 0
    assert capsys.readouterr().out.count("bytes sent") == 1


@pytest.mark.parametrize("address", ["nowhere", "ftpx://host/folder"])
def test_an_address_of_no_known_kind_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, address)
    with pytest.raises(UserError, match="SMOL_UPLOAD"):
        check_target()
    monkeypatch.delenv(VARIABLE)
    check_target()


def command(run: Run, *more: str) -> subprocess.CompletedProcess[str]:
    """One pass by hand."""
    return subprocess.run(
        [sys.executable, "-m", "recipes.upload", str(run.folder), *more], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.slow
def test_by_hand_one_pass_and_one_message(tiny_run: Run, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tiny_run, "stage1", 10)
    done = command(tiny_run, "stage1")
    assert done.returncode == 0 and "stage1 step 10: 300 bytes sent" in done.stdout, done
    held = lock(tiny_run.folder / "logs")
    assert held is not None
    done = command(tiny_run)
    assert done.returncode == 0 and "another upload of this run is at work" in done.stdout
    os.close(held)
    done = command(tiny_run, "stage9")
    assert done.returncode == 2 and done.stderr.startswith("error: tiny has no stage 'stage9'")
    monkeypatch.delenv(VARIABLE)
    done = command(tiny_run)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "SMOL_UPLOAD is not set" in done.stderr


@pytest.mark.slow
@pytest.mark.slow
def test_a_repository_on_the_hub_gets_a_few_commits_and_no_byte_twice(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tiny_run, "stage1", 23)
    with Hub() as hub:
        for key, value in {**hub.environment, VARIABLE: f"hf://{REPOSITORY}"}.items():
            monkeypatch.setenv(key, value)
        hub.refuses = "config.yaml"  # after all objects have been sent
        done = command(tiny_run)
        assert done.returncode == 1 and "step 23: failed, the next pass tries again: BadRequest" in done.stdout, done
        assert list(hub.files) == [f"tiny/stage1/23/{BEGUN}"] and hub.puts == 2 and folder.is_dir()
        hub.refuses = None
        assert command(tiny_run).returncode == 0
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert hub.files == {f"tiny/stage1/23/{BEGUN}": (folder / "manifest.json").read_bytes()} | {
            f"tiny/stage1/23/{name}": (folder / name).read_bytes() for name in names
        }
        assert hub.puts == 2 and len(hub.commits) == 3 and hub.commits[-1] == ["tiny/stage1/23/manifest.json"]
        monkeypatch.setenv(VARIABLE, "hf://team/nowhere")
        done = command(tiny_run)
        assert done.returncode == 1 and "Make sure the repository and revision exist" in done.stdout, done


@pytest.mark.slow
@pytest.mark.slow
def test_killed_in_the_middle_the_next_pass_does_the_rest(tiny_run: Run, there: Path) -> None:
    write_checkpoint(tiny_run, "stage1", 23, size=150_000_000)
    began = time.monotonic()
    start_upload(tiny_run)
    assert time.monotonic() - began < 0.5
    while not list(there.glob("23/*/*.bin")):
        assert time.monotonic() - began < 30
        time.sleep(0.002)
    (pid,) = [p for p in children_of(os.getpid()) if "recipes.upload" in (Path("/proc") / p / "cmdline").read_text()]
    os.kill(int(pid), signal.SIGKILL)
    os.waitpid(int(pid), 0)
    assert not (there / "23" / "manifest.json").exists()
    assert command(tiny_run).returncode == 0
    assert same(tiny_run, there, 23)
    assert (tiny_run.folder / "logs" / "upload.log").is_file()


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
