from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.errors import UserError
from recipes.slurm.profile import Cluster, Container, load_cluster
from recipes.slurm.render import (
    SCRIPTS,
    check_folder,
    check_word,
    common_header,
    environment,
    eval_header,
    render,
    train_header,
)

NAMES = ["train.slurm", "eval.slurm", "tokenize.slurm", "propose.slurm"]


def profile(tmp_path: Path, text: str) -> Cluster:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: h100-32x8\n" + text)
    return load_cluster(path)


def rendered(cluster: Cluster, name: str = "train.slurm") -> str:
    header = common_header(
        cluster, name="x-stage1-train", root=Path("/r"), folder=Path("/r/runs/x"), log="stage1/logs/%j.log", minutes=90
    )
    header |= eval_header(cluster, 13) if name == "eval.slurm" else train_header(cluster)
    block = environment(cluster, name, "x-stage1-train", Path("/r"), ["/r/runs/x", "stage1"])
    return render((SCRIPTS / name).read_text(), header, block)


def options(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE)
    assert len(found) == len(dict(found)), "an option twice"
    return dict(found)


@pytest.mark.parametrize("name", NAMES)
def test_scripts_are_short_plain_and_valid(name: str) -> None:
    text = (SCRIPTS / name).read_text()
    assert len(text.splitlines()) <= 80
    assert text.count("# --- site: ") == 1
    assert max(map(len, text.splitlines())) <= 120
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPTS / name], check=True)


def test_a_training_job_asks_for_what_the_profile_says(tmp_path: Path) -> None:
    text = rendered(profile(tmp_path, "partition: gpu\naccount: me\nqos: high\nexclude: node07\nmail: {user: a@b.c}\n"))
    assert options(text) == {
        "job-name": "x-stage1-train", "nodes": "32", "ntasks-per-node": "1", "exclusive": "", "mem": "0",
        "time": "0-01:30:00", "signal": "B:USR1@600", "requeue": "", "open-mode": "append",
        "output": "/r/runs/x/stage1/logs/%j.log", "chdir": "/r", "comment": "/r/runs/x", "partition": "gpu",
        "account": "me", "qos": "high", "exclude": "node07", "mail-user": "a@b.c", "mail-type": "FAIL,END",
        "cpus-per-task": "96", "gres": "gpu:h100:8",
    }  # fmt: skip
    assert text.startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_every_option_stands_before_the_first_command(tmp_path: Path) -> None:
    lines = rendered(profile(tmp_path, "")).splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])


def test_an_evaluation_is_an_array_of_single_gpus(tmp_path: Path) -> None:
    found = options(rendered(profile(tmp_path, "evaluation: {at_once: 4, partition: small}\n"), "eval.slurm"))
    wanted = {"array": "0-12%4", "gres": "gpu:h100:1", "partition": "small", "mem": "128G", "nodes": "1"}
    assert {key: found[key] for key in wanted} == wanted and "exclusive" not in found
    assert options(rendered(load_cluster("virtual"), "eval.slurm"))["gres"] == "none"


def test_no_gpus_are_asked_for_where_there_are_none(tmp_path: Path) -> None:
    assert "gres" not in options(rendered(profile(tmp_path, "gpu_check: none\n")))
    assert options(rendered(profile(tmp_path, "gpu_type:\n")))["gres"] == "gpu:8"


def test_the_environment_arrives_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORK", "/w")
    odd = "a 'b' $HOME `id` \\"
    cluster = profile(
        tmp_path, "shared: $WORK/x\nscratch: $HERE/tmp\nsetup: ['export A=\"1 2\"']\nmodules: [cuda/12.8]\n"
    )
    cluster = cluster.model_copy(update={"env": {"ODD": odd}})
    script = "\n".join(environment(cluster, "train.slurm", "n", Path("/r"), ["/r/x y", "stage1"]))
    script = f'module() {{ echo "module $*"; }}\n{script}\nprintf \'%s\\n\' "$ODD" "$A" "$HF_HOME" "$TMPDIR" "$@"'
    done = subprocess.run(["bash", "-c", script], env={"HERE": "/n"}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "module load cuda/12.8", odd, "1 2", "/w/x/huggingface", "/n/tmp", "/r/x y", "stage1",
    ]  # fmt: skip


def test_jobs_run_the_python_that_launched_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = load_cluster("virtual")
    monkeypatch.setattr("sys.prefix", "/my env")
    line = "export PATH='/my env/bin':$PATH  # the Python that launched this"
    assert line in environment(cluster, "train.slurm", "n", Path("/r"), [])
    image = cluster.model_copy(update={"container": Container(image="x")})
    assert line not in environment(image, "train.slurm", "n", Path("/r"), [])
    monkeypatch.setattr("sys.prefix", sys.base_prefix)
    assert not any("PATH" in line for line in environment(cluster, "train.slurm", "n", Path("/r"), []))


def test_a_module_that_does_not_load_ends_the_job(tmp_path: Path) -> None:
    lines = environment(profile(tmp_path, "modules: [nowhere/1]\n"), "train.slurm", "n", Path("/r"), [])
    script = "module() { return 7; }\n" + "\n".join(lines) + "\necho went on"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "")


def test_a_container_sees_the_clone_and_the_sites_folders(tmp_path: Path) -> None:
    text = "shared: /w\nscratch: $TMP/x\ncontainer: {image: 'r#i:1', mounts: ['/opt/a:/a']}\n"
    line = environment(profile(tmp_path, text), "train.slurm", "n", Path("/r"), [])[-1]
    done = subprocess.run(
        ["bash", "-c", f"{line}\nprintf '%s\\n' \"${{CONTAINER[@]}}\""],
        env={"TMP": "/t"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "--container-image=r#i:1", "--container-workdir=/r", "--container-mounts=/r:/r,/w:/w,/opt/a:/a,/t/x:/t/x",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a b", "a;b", "$(id)", "-x", ".x", "a/b", "ä", "x\n", ""])
def test_names_that_cannot_be_a_jobs(name: str) -> None:
    with pytest.raises(UserError, match="cannot stand in a job's name"):
        check_word(name, "the run")


def test_the_port_of_the_rendezvous_comes_from_the_jobs_number() -> None:
    port = re.search(r"PORT=(\$\(\(.*?\)\))", (SCRIPTS / "train.slurm").read_text())
    assert port
    script = f"for JOB in 7 8 19999 20000 123456789; do echo {port[1]}; done"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["10007", "10008", "29999", "10000", "26789"]  # below those that systems hand out


def test_folders_that_slurm_cannot_be_given(tmp_path: Path) -> None:
    assert check_folder(tmp_path) == tmp_path.resolve()
    for name in ("a b", "a%j", "a'b"):
        with pytest.raises(UserError, match="Slurm cannot be given this path"):
            check_folder(tmp_path / name)


def test_arguments_are_quoted() -> None:
    lines = environment(load_cluster("virtual"), "eval.slurm", "n", Path("/r"), ["a b", "$(id)"])
    assert shlex.split(next(line for line in lines if line.startswith("set -- ")))[2:] == ["a b", "$(id)"]


@pytest.mark.parametrize(
    ("answer", "signal", "goes_on"),
    [
        ("JobState=RUNNING Reason=None Restarts=1 ", "none", True),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=1 ", "USR1", True),
        ("JobState=COMPLETING Reason=None Restarts=1 ", "CANCEL", False),
        ("JobState=PENDING Reason=BeginTime Restarts=2 ", "TERM", False),
    ],
)
def test_what_slurm_says_of_a_job_that_ends(tmp_path: Path, answer: str, signal: str, goes_on: bool) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\n[ "$1" = ping ] && echo "ctl is UP" || echo "{answer}"\n')
    (tmp_path / "scontrol").chmod(0o755)
    text = (SCRIPTS / "train.slurm").read_text()
    function = text[text.index("slurm_says() {") : text.index("again() {")]
    script = f"JOB=7 RESTART=1 SIGNAL=none; {function}\nslurm_says && echo $SIGNAL yes || echo $SIGNAL no"
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    said = subprocess.run(["bash", "-c", script], env=path, capture_output=True, text=True, check=True).stdout
    assert said.split() == [signal, "yes" if goes_on else "no"]
