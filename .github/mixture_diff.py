"""What a pull request changes in the data, as Markdown: a file, the job's summary, one comment that is kept up to date.

Run by .github/workflows/mixture-diff.yml. Exit code 0: fine; 2: a recipe is wrong after the change.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.diff.compare import Diff
from recipes.diff.show import fenced, to_markdown
from recipes.diff.sides import compare
from recipes.errors import UserError
from recipes.files import write_atomic
from recipes.lint import lint
from recipes.loader import load, recipe_names

MARKER = "<!-- mixture-diff -->"
"""Invisible first line of the comment, by which it is found again."""
LONGEST = 60_000
"""Characters of a comment; GitHub takes 65,536."""


def main(arguments: list[str] | None = None) -> int:
    """Compares, lints, writes and posts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="HEAD^1", help="revision to compare with: a merge commit's first parent")
    parser.add_argument("--out", type=Path, default=Path("mixture-diff.md"))
    options = parser.parse_args(arguments)
    root = Path.cwd()
    try:
        diff = replace(compare(options.base, None, root), before=base_name(options.base), after="this change")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    errors = lint_errors(root)
    text = "\n".join((MARKER, "### What this changes in the data", "", report(diff, errors)))
    write_atomic(options.out, text)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(text)
    for found in errors:
        print(f"error: {' '.join(found.split())}", file=sys.stderr)  # one line: the runner obeys lines that begin ::
    print(post(shortened(text), os.environ))
    return 2 if errors else 0


def base_name(revision: str) -> str:
    """The branch that the pull request goes to, or the revision outside of one."""
    return os.environ.get("GITHUB_BASE_REF") or revision


def lint_errors(root: Path) -> list[str]:
    """What is wrong with the recipes as they are now, each said once."""
    errors: dict[str, None] = {}
    for name in recipe_names(root):
        try:
            errors |= {str(finding): None for finding in lint(load(name, root)) if finding.level == "error"}
        except UserError as error:
            errors[str(error)] = None
    return list(errors)


def report(diff: Diff, errors: list[str]) -> str:
    """Lint's errors, those that the diff says left out, then the diff."""
    told = {problem.text for problem in diff.problems}
    found = [
        "**Errors that must be corrected (`smol lint`):**",
        "",
        fenced("\n".join(e for e in errors if e not in told)),
    ]
    return "\n".join([*(found if set(errors) - told else []), "", to_markdown(diff)]).lstrip()


def shortened(text: str) -> str:
    """The text as far as a comment can hold it, cut at a line."""
    if len(text) <= LONGEST:
        return text
    return text[:LONGEST].rpartition("\n")[0] + "\n\n_Cut here: the job's summary has all of it._\n"


def post(text: str, environment: Mapping[str, str]) -> str:
    """Writes the pull request's comment, or the one that is there anew; says what it did.

    A fork's token may only read: then the summary has to do, and nothing fails.
    """
    token, number = environment.get("GITHUB_TOKEN"), environment.get("PULL_REQUEST")
    if not token or not number:
        return "not on a pull request: no comment"
    server = environment.get("GITHUB_API_URL", "https://api.github.com")
    issues = f"{server}/repos/{environment['GITHUB_REPOSITORY']}/issues"
    try:
        mine = own_comment(f"{issues}/{number}/comments", token)
        if mine is None:
            request("POST", f"{issues}/{number}/comments", token, {"body": text})
            return "comment written"
        request("PATCH", f"{issues}/comments/{mine}", token, {"body": text})
        return "comment brought up to date"
    except urllib.error.HTTPError as error:
        return f"::notice::no comment (HTTP {error.code}): the job's summary has the diff"
    except OSError as error:
        return f"::warning::no comment ({error}): the job's summary has the diff"


def own_comment(url: str, token: str) -> int | None:
    """The id of the comment that this script wrote earlier."""
    for page in range(1, 100):
        comments = request("GET", f"{url}?per_page=100&page={page}", token)
        for comment in comments:
            if comment["body"].startswith(MARKER) and comment["user"]["type"] == "Bot":
                return int(comment["id"])
        if len(comments) < 100:
            break
    return None


def request(method: str, url: str, token: str, body: dict[str, str] | None = None) -> Any:
    """One call of GitHub's REST API."""
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/vnd.github+json"}
    data = json.dumps(body).encode() if body else None
    call = urllib.request.Request(url, data, {**headers, "Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(call, timeout=30) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    sys.exit(main())
