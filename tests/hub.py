"""A Hub on this machine: as much of its protocol as uploading to a model repository needs, LFS by plain HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

REPOSITORY = "team/model"
ENVIRONMENT = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_of_a_test", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Hub(ThreadingHTTPServer):
    """The repository `REPOSITORY`, empty at first; a context manager."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        """The main branch's, by path."""
        self.objects: dict[str, bytes] = {}
        """Of LFS, by sha256: there before a commit names them."""
        self.commits: list[list[str]] = []
        """The paths that each has added or deleted."""
        self.puts = 0
        """Objects that were sent."""
        self.refuses: str | None = None
        """A commit that holds this text is answered with an error."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to take this for the Hub."""
        return {**ENVIRONMENT, "HF_ENDPOINT": f"http://127.0.0.1:{self.server_address[1]}"}

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Carries out a commit: its lines as the client sends them."""
        changes = [line for line in lines if line["key"] != "header"]
        for line in changes:
            path = line["value"]["path"]
            if line["key"] == "file":
                self.files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                self.files[path] = self.objects[line["value"]["oid"]]
            else:
                del self.files[path]
        self.commits.append([line["value"]["path"] for line in changes])


class Handler(BaseHTTPRequestHandler):
    """Answers for a Hub."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Prints nothing."""

    def do_GET(self) -> None:
        head, _, path = unquote(self.path.partition("?")[0]).partition("/resolve/main/")
        if head.startswith(f"/api/models/{REPOSITORY}/tree/main"):
            self.answer_tree(head.partition("/tree/main")[2].strip("/"))
        elif head.startswith("/api/models/"):
            known = head.removeprefix("/api/models/").removesuffix("/revision/main") == REPOSITORY
            self.answer(200, {"id": REPOSITORY, "sha": "0" * 40, "siblings": []}) if known else self.missing("Repo")
        else:
            self.answer(200, self.server.files[path]) if path in self.server.files else self.missing("Entry")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self.body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.server.puts += 1
        self.answer(200, b"")

    def do_POST(self) -> None:
        body = self.body()
        if self.path.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            files = [{"path": file["path"], "uploadMode": modes[file["path"].endswith((".bin", ".safetensors"))],
                      "shouldIgnore": False} for file in json.loads(body)["files"]]  # fmt: skip
            self.answer(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer(200, {"objects": [self.lfs(entry) for entry in json.loads(body)["objects"]]})
        elif self.path.endswith("/commit/main") and (self.server.refuses or "\n\n") in body.decode():
            self.answer(400, {"error": "refused by the test"})
        elif self.path.endswith("/commit/main"):
            self.server.commit([json.loads(line) for line in body.splitlines()])
            url = f"http://127.0.0.1:{self.server.server_address[1]}/{REPOSITORY}/commit/{'0' * 40}"
            self.answer(200, {"commitUrl": url, "commitOid": "0" * 40})
        else:
            self.missing("Entry")

    def lfs(self, entry: dict[str, Any]) -> dict[str, Any]:
        """An object of the batch: where it is to be put, if it is not here yet."""
        url = f"http://127.0.0.1:{self.server.server_address[1]}/put/{entry['oid']}"
        return entry if entry["oid"] in self.server.objects else {**entry, "actions": {"upload": {"href": url}}}

    def answer_tree(self, folder: str) -> None:
        """The entries of a folder."""
        below = {path: content for path, content in self.server.files.items() if path.startswith(f"{folder}/")}
        names = {path[len(folder) + 1 :].partition("/")[0]: f"{folder}/{path[len(folder) + 1 :]}" for path in below}
        entries = [
            {"type": "file", "path": path, "size": len(below[path]), "oid": "0" * 40}
            if (path := f"{folder}/{name}") in below else {"type": "directory", "path": path, "oid": "0" * 40}
            for name in names
        ]  # fmt: skip
        self.answer(200, entries) if entries else self.missing("Entry")

    def missing(self, what: str) -> None:
        """There is no such thing."""
        self.answer(404, {"error": f"{what} not found"}, {"X-Error-Code": f"{what}NotFound"})

    def body(self) -> bytes:
        """What was sent."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, code: int, content: bytes | Any, headers: dict[str, str] | None = None) -> None:
        """Sends JSON, or bytes as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
