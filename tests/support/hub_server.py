"""A small Hub on this machine, which speaks what the `huggingface_hub` client asks for: repositories, validation of
cards, LFS uploads in one or several parts, commits, and downloads. Tests make it refuse, fail or hang up.

By hand: `python tests/support/hub_server.py`, then `HF_ENDPOINT=http://127.0.0.1:8400 HF_TOKEN=hf_write ...`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from card_rules import card_errors
from huggingface_hub import close_session

USER = "somebody"
XET = "taken on trust: "
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".png")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Keeps repositories in memory.

    Args:
        port (`int`): Port on 127.0.0.1; 0 for any that is free.
        chunk_size (`int`, *optional*): Size of the parts that larger LFS objects are asked for in.

    Attributes:
        tokens: Access tokens and whether they may write.
        repos: Name -> path -> content, of the main branch.
        objects: LFS objects by their sha256.
        commits: Name -> messages of its commits.
        received: The body of every request.
        calls: How often each kind of request came.
    """

    daemon_threads = True

    def __init__(self, port: int = 0, chunk_size: int | None = None) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.chunk_size = chunk_size
        self.tokens = {"hf_write": True, "hf_read": False}
        self.repos: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str | None] = {}
        self.commits: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.received: list[bytes] = []
        self.calls: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._faults: dict[str, list[Any]] = {}

    def fail(self, kind: str, fault: int | str, times: int = 10**9) -> None:
        """Makes requests fail.

        Args:
            kind (`str`):
                `"create"`, `"validate"`, `"preupload"`, `"batch"`, `"upload"`, `"complete"`, `"commit"`, `"xet_token"`,
                `"xorb"`, `"shard"`, `"tree"`, `"info"` or `"resolve"`.
            fault (`int` or `str`):
                A status to answer with, `"drop"` to hang up half-way through the body, or `"drop_answer"` to do what
                is asked and hang up.
            times (`int`): How many requests fail.
        """
        self._faults[kind] = [fault, times]

    def heal(self) -> None:
        self._faults.clear()

    def take_fault(self, kind: str) -> int | str | None:
        with self.lock:
            self.calls[kind] += 1
            fault = self._faults.get(kind)
            if fault is None or fault[1] <= 0:
                return None
            fault[1] -= 1
            return fault[0]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


# What is asked without a token: storage has addresses that are signed, and public repositories are read by anyone.
_OPEN = ("validate", "upload", "complete", "xorb", "shard", "resolve", "tree", "info")


class _HungUp(Exception):
    """The connection is closed on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    ROUTES: tuple[tuple[str, str, str, str], ...] = (
        ("GET", r"/api/whoami-v2", "whoami", "whoami"),
        ("POST", r"/api/repos/create", "create", "create"),
        ("POST", r"/api/validate-yaml", "validate", "validate"),
        ("POST", r"/api/models/(?P<repo>.+)/preupload/(?P<revision>[^/]+)", "preupload", "preupload"),
        ("POST", r"/api/models/(?P<repo>.+)/commit/(?P<revision>[^/]+)", "commit", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)/(?P<part>\d+)", "upload", "upload_part"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "upload", "upload"),
        ("POST", r"/lfs/(?P<oid>\w+)/complete", "complete", "complete"),
        ("POST", r"/lfs/(?P<oid>\w+)/verify", "verify", "verify"),
        ("GET", r"/api/models/(?P<repo>.+)/tree/(?P<revision>[^/?]+)(/.*)?", "tree", "tree"),
        ("GET", r"/api/models/(?P<repo>.+)/xet-write-token/(?P<revision>[^/]+)", "xet_token", "xet_token"),
        ("POST", r"/(v1/)?xorbs/.+", "xorb", "xet_data"),
        ("POST", r"/(v1/)?shards.*", "shard", "xet_data"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info", "info"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve", "resolve"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve", "resolve"),
    )

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def _route(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for method, pattern, kind, name in self.ROUTES:
            match = re.fullmatch(pattern, unquote(url.path))
            if method == self.command and match is not None:
                self._serve(kind, getattr(self, f"_{name}"), {k: v for k, v in match.groupdict().items() if v})
                return
        self._read_body(int(self.headers.get("Content-Length") or 0))
        self._error(404, "Sorry, we can't find the page you are looking for.")

    do_GET = do_POST = do_PUT = do_HEAD = _route

    def _serve(self, kind: str, answer: Callable[..., None], arguments: dict[str, str]) -> None:
        fault = self.server.take_fault(kind)
        length = int(self.headers.get("Content-Length") or 0)
        try:
            if fault == "drop":
                self.rfile.read(max(1, length // 2))
                raise _HungUp
            self.body = self._read_body(length)
            if isinstance(fault, int):
                return self._error(fault, "a fault of the test")
            self.silent = fault == "drop_answer"
            if kind not in _OPEN and not self._allowed(kind):
                return None
            answer(**arguments)
        except _HungUp:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        return None

    def _read_body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(pieces)
        else:
            body = self.rfile.read(length)
        self.server.received.append(body)
        return body

    def _allowed(self, kind: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.server.tokens:
            self._error(401, "Invalid credentials in Authorization header")
        elif kind != "whoami" and not self.server.tokens[token]:
            self._error(403, "Forbidden: pass a token that may write")
        else:
            return True
        return False

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if getattr(self, "silent", False):
            raise _HungUp
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message, **({} if code is None else {"X-Error-Code": code})}
        self._answer({"error": message}, status, headers)

    def _files(self, repo: str) -> dict[str, bytes] | None:
        if repo not in self.server.repos:
            self._error(404, "Repository not found", "RepoNotFound")
        return self.server.repos.get(repo)

    # Repositories

    def _whoami(self) -> None:
        self._answer({"type": "user", "name": USER, "fullname": USER, "auth": {"type": "access_token"}, "orgs": []})

    def _create(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted['organization'] or USER}/{wanted['name']}"
        exists = repo in self.server.repos
        answer = {"url": f"{self.server.url}/{repo}", "name": repo}
        if exists:
            self._answer({"error": "You already created this model repo", **answer}, 409)
            return
        self.server.repos[repo] = {}
        self.server.visibility[repo] = wanted.get("visibility")
        self.server.commits[repo] = ["initial commit"]
        self._answer(answer)

    def _validate(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._answer(answer, 400 if errors else 200)

    def _preupload(self, repo: str, revision: str) -> None:
        files = self._files(repo)
        if files is None:
            return
        answer = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular"
            there = files.get(file["path"])
            oid = None
            if there is not None:
                oid = hashlib.sha256(there).hexdigest() if mode == "lfs" else git_oid(there)
                oid = there.decode().removeprefix(XET) if there.startswith(XET.encode()) else oid
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": answer})

    def _commit(self, repo: str, revision: str) -> None:
        files = self._files(repo)
        if files is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        new = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.objects.get(value["oid"])
                if content is None and self.server.calls["shard"]:
                    new[value["path"]] = f"{XET}{value['oid']}".encode()
                    continue
                if content is None or len(content) != value["size"]:
                    self._error(400, f"LFS object of {value['path']} was not uploaded")
                    return
                new[value["path"]] = content
            else:
                self._error(400, f"unknown operation {line['key']}")
                return
        self.server.repos[repo] = new  # all of a commit or nothing
        self.server.commits[repo].append(lines[0]["value"]["summary"])
        sha = self._sha(repo)
        self._answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def _sha(self, repo: str) -> str:
        return hashlib.sha1("\n".join(self.server.commits[repo]).encode()).hexdigest()

    # Large files

    def _batch(self, repo: str) -> None:
        answer = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.server.objects:
                url, chunk = f"{self.server.url}/lfs/{oid}", self.server.chunk_size
                upload: dict[str, Any] = {"href": url}
                if chunk is not None and size > chunk:
                    parts = {f"{i + 1:05d}": f"{url}/{i + 1}" for i in range(-(-size // chunk))}
                    upload = {"href": f"{url}/complete", "header": {"chunk_size": str(chunk), **parts}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
            answer.append(entry)
        self._answer({"transfer": "basic", "objects": answer})

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            self._error(400, "the object's sha256 is another one")
            return
        self.server.objects[oid] = content
        self._answer({})

    def _upload(self, oid: str) -> None:
        self._keep(oid, self.body)

    def _upload_part(self, oid: str, part: str) -> None:
        self.server.parts[oid, int(part)] = self.body
        self._answer({}, headers={"ETag": hashlib.sha256(self.body).hexdigest()})

    def _complete(self, oid: str) -> None:
        parts = json.loads(self.body)["parts"]
        pieces = [self.server.parts[oid, part["partNumber"]] for part in parts]
        if [hashlib.sha256(piece).hexdigest() for piece in pieces] != [part["etag"] for part in parts]:
            self._error(400, "the parts are other ones")
            return
        self._keep(oid, b"".join(pieces))

    def _verify(self, oid: str) -> None:
        content = self.server.objects.get(oid)
        if content is None or len(content) != json.loads(self.body)["size"]:
            self._error(404, "the object is not there")
            return
        self._answer({})

    # Xet, the client's other way for large files. What arrives is taken on trust: only their chunks do, compressed.

    def _xet_token(self, repo: str, revision: str) -> None:
        self._answer({"casUrl": self.server.url, "accessToken": "xet", "exp": 9999999999})

    def _xet_data(self) -> None:
        self._answer({"was_inserted": True, "result": 1})

    # Reading

    def _info(self, repo: str, revision: str = "main") -> None:
        files = self._files(repo)
        if files is not None:
            siblings = [{"rfilename": name} for name in files]
            self._answer({"id": repo, "modelId": repo, "sha": self._sha(repo), "siblings": siblings, "tags": []})

    def _tree(self, repo: str, revision: str) -> None:
        files = self._files(repo)
        if files is not None:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
                for name, content in files.items()
            ]
            self._answer(entries)

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        files = self._files(repo)
        if files is None:
            return
        if path not in files:
            self._error(404, "Entry not found", "EntryNotFound")
            return
        headers = {"ETag": f'"{git_oid(files[path])}"', "X-Repo-Commit": self._sha(repo)}
        self._answer(files[path], headers={**headers, "Content-Type": "application/octet-stream"})


@contextmanager
def running(
    monkeypatch: pytest.MonkeyPatch, token: str = "hf_write", xet: bool = False, **settings: Any
) -> Iterator[HubServer]:
    """A server that the client in this process talks to, logged in with `token`, and without waiting between retries.

    Large files go the way of LFS, which lets their content be checked, or of Xet, which is the client's default.
    """
    server = HubServer(**settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    with monkeypatch.context() as patch:
        constants = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        for name, value in {**constants, "HF_HUB_DISABLE_XET": not xet}.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        patch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        patch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address of the Hub
        patch.setenv("HF_TOKEN", token)
        patch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="A small Hub on 127.0.0.1; tokens are hf_write and hf_read.")
    parser.add_argument("--port", type=int, default=8400)
    server = HubServer(parser.parse_args().port)
    print(f"HF_ENDPOINT={server.url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
