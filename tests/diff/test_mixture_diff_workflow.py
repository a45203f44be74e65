from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from recipes.diff.compare import Diff, Problem

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".github" / "mixture_diff.py"
WORKFLOW = ROOT / ".github" / "workflows" / "mixture-diff.yml"
STAGE2 = "mixtures/smollm2-1.7b/stage2.yaml"


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def pull_request(folder: Path, path: str, *changes: tuple[str, str]) -> None:
    """What the runner checks out: the merge of a branch that changes one file into a `main` that went on."""
    git(folder, "checkout", "-qb", "change")
    text = (folder / path).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / path).write_text(text)
    git(folder, "commit", "-qam", "change")
    git(folder, "checkout", "-q", "main")
    (folder / "mixtures/smollm2-135m/stage1.yaml").open("a").write("# main went on\n")
    git(folder, "commit", "-qam", "meanwhile")
    git(folder, "merge", "-q", "--no-ff", "-m", "merge", "change")


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mixture_diff", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repo(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    git(tree, "init", "-q", "-b", "main")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "one")
    monkeypatch.chdir(tree)
    for name in ("GITHUB_TOKEN", "PULL_REQUEST", "GITHUB_STEP_SUMMARY", "GITHUB_API_URL", "GITHUB_BASE_REF"):
        monkeypatch.delenv(name, raising=False)
    return tree


def test_the_script_as_the_runner_starts_it(repo: Path) -> None:
    pull_request(repo, STAGE2, ("0.75", "0.70"), ("0.05", "0.10"))
    environment = {
        "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "GITHUB_STEP_SUMMARY": str(repo / "summary.md"),
        "GITHUB_BASE_REF": "release`s",
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), "--base", "HEAD^1"]
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text = (repo / "mixture-diff.md").read_text()
    assert text == (repo / "summary.md").read_text()
    assert text.startswith(
        "<!-- mixture-diff -->\n### What this changes in the data\n\n`release's` → `this change`: **smoll"
    )
    assert "| open-web-math | 5.00 → 10.00 | +5.00 | 100B → 200B | 8.33 → 16.7 | 8.33! → 16.7! | 82 → 65 |" in text
    assert "smollm2-135m" not in text, "what main did meanwhile is not the pull request's"


def test_an_unchanged_mixture_says_so(repo: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    pull_request(repo, STAGE2, ("# 6-8T:", "# From 6T to 8T:"))
    assert script.main([]) == 0
    assert "**no change in the data**" in (repo / "mixture-diff.md").read_text()
    assert capsys.readouterr().out == "not on a pull request: no comment\n"


def test_a_broken_mixture_ends_in_code_2_and_one_message(
    repo: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pull_request(repo, STAGE2, ("0.75", "0.70"))
    assert script.main(["--out", "out.md"]) == 2
    message = f"{STAGE2}:2: domains: the domains' shares sum to 0.95. Change one by +0.05"
    assert capsys.readouterr().err.count(message) == 1
    text = (repo / "out.md").read_text()
    assert text.count(message) == 1 and "1 recipe cannot be read" in text


def test_an_error_cannot_give_the_runner_orders(
    repo: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pull_request(repo, STAGE2, ("fineweb-edu: 0.60", '"x\\n::warning::y": 0.60'))
    assert script.main([]) == 2
    said = capsys.readouterr()
    assert "::warning::y" in said.err
    assert not [line for line in (said.out + said.err).splitlines() if line.startswith("::")]


def test_a_lint_error_ends_in_code_2(repo: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    pull_request(repo, "stages/smollm2-135m/recipe.yaml", ("dp: 64 ", "dp: 32 "))
    assert script.main([]) == 2
    assert "dp 32 × micro_batch 8" in capsys.readouterr().err
    assert "Errors that must be corrected" in (repo / "mixture-diff.md").read_text()


def test_what_the_diff_says_is_not_said_twice(script: ModuleType) -> None:
    diff = Diff("a", "b", problems=(Problem("after", "cannot read that"),))
    assert script.report(diff, ["cannot read that", "wrong dp"]).count("cannot read that") == 1
    assert "wrong dp" in script.report(diff, ["cannot read that", "wrong dp"])
    assert "Errors" not in script.report(diff, ["cannot read that"])


def test_mending_what_was_broken_passes(repo: Path, script: ModuleType) -> None:
    text = (repo / STAGE2).read_text()
    (repo / STAGE2).write_text(text.replace("0.75", "0.70"))
    git(repo, "commit", "-qam", "broken")
    pull_request(repo, STAGE2, ("0.70", "0.75"))
    assert script.main([]) == 0
    assert f"HEAD^1:{STAGE2}:2" in (repo / "mixture-diff.md").read_text()


def test_an_unknown_base_is_one_message(repo: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--base", "HEAD^1"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no git revision 'HEAD^1'")


# ---------------------------------------------------------------- the comment, on a server that keeps comments


class Server(HTTPServer):
    """Keeps a pull request's comments as GitHub's API shows them."""

    def __init__(self) -> None:
        self.comments: list[dict[str, Any]] = []
        self.calls: list[tuple[str, str, str | None]] = []
        self.may_write = True
        super().__init__(("127.0.0.1", 0), Handler)

    def add(self, body: str, kind: str) -> None:
        self.comments.append({"id": len(self.comments) + 1, "body": body, "user": {"type": kind}})


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        page = int(re.search(r"page=(\d+)$", self.path)[1])  # type: ignore[index]
        self.answer(200, self.server.comments[100 * (page - 1) : 100 * page])

    def do_POST(self) -> None:
        self.write(lambda body: self.server.add(body, "Bot"))

    def do_PATCH(self) -> None:
        number = int(self.path.rsplit("/", 1)[1])
        self.write(lambda body: self.server.comments[number - 1].update(body=body))

    def write(self, do: Any) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["body"]
        if not self.server.may_write:
            return self.answer(403, {"message": "Resource not accessible by integration"})
        do(body)
        return self.answer(200, {})

    def answer(self, code: int, content: Any) -> None:
        self.server.calls.append((self.command, self.path.split("?")[0], self.headers["Authorization"]))
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def environment(server: Server) -> dict[str, str]:
    return {
        "GITHUB_API_URL": f"http://127.0.0.1:{server.server_port}", "GITHUB_REPOSITORY": "o/r",
        "GITHUB_TOKEN": "secret", "PULL_REQUEST": "7",
    }  # fmt: skip


def test_one_comment_is_written_and_then_kept_up_to_date(
    repo: Path, script: ModuleType, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pull_request(repo, STAGE2, ("0.75", "0.70"), ("0.05", "0.10"))
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    for i in range(120):
        server.add(f"<!-- mixture-diff --> quoted by a person {i}", "User")
    assert script.main([]) == script.main(["--base", "HEAD"]) == 0
    assert len(server.comments) == 121, "the second run found the first one's comment, on the second page"
    assert "no change in the data" in server.comments[-1]["body"]
    assert capsys.readouterr().out == "comment written\ncomment brought up to date\n"
    writes = [call for call in server.calls if call[0] != "GET"]
    assert writes == [
        ("POST", "/repos/o/r/issues/7/comments", "Bearer secret"),
        ("PATCH", "/repos/o/r/issues/comments/121", "Bearer secret"),
    ]


def test_a_token_that_may_only_read_does_not_fail(script: ModuleType, server: Server) -> None:
    server.may_write = False
    said = script.post("text", environment(server))
    assert said == "::notice::no comment (HTTP 403): the job's summary has the diff" and not server.comments


def test_a_server_that_is_away_does_not_fail(script: ModuleType, server: Server) -> None:
    gone = {**environment(server), "GITHUB_API_URL": "http://127.0.0.1:1"}
    assert script.post("text", gone).startswith("::warning::no comment")


def test_a_long_text_is_cut_at_a_line(script: ModuleType) -> None:
    text = script.shortened("| row |\n" * 20_000)
    assert len(text) < 65_536 and text.endswith("| row |\n\n_Cut here: the job's summary has all of it._\n")
    assert script.shortened("short\n") == "short\n"


# ---------------------------------------------------------------- the workflow


def test_the_workflow_may_do_little_and_takes_no_foreign_text_into_a_shell() -> None:
    workflow = yaml.load(WORKFLOW.read_text(), Loader=yaml.BaseLoader)
    assert workflow["on"] == {"pull_request": {"paths": ["mixtures/**", "stages/**"]}}
    assert workflow["permissions"] == {"contents": "read", "pull-requests": "write"}
    [job] = workflow["jobs"].values()
    assert "permissions" not in job
    for step in job["steps"]:
        assert "${{" not in step.get("run", "")
        assert "uses" not in step or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
    assert job["steps"][0]["with"] == {"fetch-depth": "0", "persist-credentials": "false"}
    started = [step["run"] for step in job["steps"] if "mixture_diff.py" in step.get("run", "")]
    assert started == ["python .github/mixture_diff.py --base HEAD^1"] and SCRIPT.is_file()


def test_the_workflow_installs_all_that_the_script_imports(repo: Path) -> None:
    """What a run has imported belongs to packages that the workflow names, or that these bring."""
    workflow = yaml.load(WORKFLOW.read_text(), Loader=yaml.BaseLoader)
    [install] = [s["run"] for s in workflow["jobs"]["diff"]["steps"] if "-c constraints.txt" in s.get("run", "")]
    named = set(install.split("constraints.txt ")[1].split())
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert named <= pinned
    code = (
        "import importlib.metadata as m, runpy, sys\n"
        "sys.argv = [sys.argv[1], '--base', 'HEAD']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "owners = m.packages_distributions()\n"
        "tops = {n.split('.')[0] for n in sys.modules}\n"
        "print(*sorted({d.lower() for t in tops for d in owners.get(t, [])}))"
    )
    command = [sys.executable, "-c", code, str(SCRIPT)]
    clean = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=repo, env=clean, capture_output=True, text=True, check=True)
    brought = {"pydantic_core", "annotated-types", "typing_extensions", "typing-inspection"}  # by pydantic
    brought |= {"pygments", "markdown-it-py", "mdurl"}  # by rich
    used = set(done.stdout.splitlines()[-1].split()) - {"smollm2-recipes", "setuptools", "pip"}
    assert {"pydantic", "numpy"} <= used <= named | brought
