"""Models from the Hub, against a small server of our own: only config.json, every refusal one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from peftplan.arch.hub import is_hub_id

pytest.importorskip("huggingface_hub")

COMMIT = {"main": "1" * 40, "v2": "2" * 40}
TINY = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 97,
    "dtype": "bfloat16",
}
HUGE_BYTES = 200 * 10**6

FILES: dict[tuple[str, str], bytes] = {
    ("good/model", "main"): json.dumps(TINY).encode(),
    ("good/model", "v2"): json.dumps({**TINY, "hidden_size": 96}).encode(),
    ("broken/json", "main"): b"<html>maintenance</html>",
    ("other/family", "main"): json.dumps({"model_type": "falcon"}).encode(),
    ("with/code", "main"): json.dumps({**TINY, "auto_map": {"AutoConfig": "code.Config"}}).encode(),
    ("own/code", "main"): json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "c.C"}}).encode(),
    ("meta-llama/Llama-3.1-8B", "v2"): json.dumps(TINY).encode(),
}
REFUSALS: dict[str, tuple[int, str]] = {
    "no/such": (404, "RepoNotFound"),
    "a/private-one": (401, "RepoNotFound"),
    "a/gated-one": (401, "GatedRepo"),
    "a/gated-two": (403, "GatedRepo"),
    "gguf/only": (404, "EntryNotFound"),
    "server/down": (500, ""),
    "server/forbids": (403, ""),
}


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.server.seen.append((self.command, self.path))
        owner, name, _, revision, _ = self.path.lstrip("/").split("/")
        repo = f"{owner}/{name}"
        if repo in REFUSALS:
            self._head(*REFUSALS[repo])
        elif repo == "huge/config":
            self._serve(b"", revision, size=HUGE_BYTES)
        elif (repo, revision) in FILES:
            data = FILES[repo, revision]
            self._serve(data if body else b"", revision, size=len(data))
        else:
            self._head(404, "RevisionNotFound" if repo == "good/model" else "RepoNotFound")

    def _head(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT["main"])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _serve(self, data: bytes, revision: str, *, size: int) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hash((self.path, size)) & 0xFFFF:040x}"')
        self.send_header("X-Repo-Commit", COMMIT.get(revision, revision))
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str]] = []


ASK = """
import json, sys
from peftplan.arch import load_arch
from peftplan.errors import PeftplanError
def ask(name):
    try:
        arch = load_arch(name)
        return {"hidden": arch.hidden, "notes": arch.notes, "name": arch.name}
    except PeftplanError as error:
        return {"error": type(error).__name__, "exit_code": error.exit_code, "line": str(error)}
print(json.dumps({name: ask(name) for name in sys.argv[1:]}))
"""


@dataclass
class Asked:
    """What one process answered for several names, and what it wrote to stderr."""

    answers: dict[str, dict[str, Any]]
    stderr: str
    seen: list[tuple[str, str]] = field(default_factory=list)


def ask(*names: str, home: Path, endpoint: str, offline: bool = False) -> Asked:
    """huggingface_hub reads its environment when imported, so each setting is a process of its own."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    result = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env={**inherited, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return Asked(answers=json.loads(result.stdout), stderr=result.stderr)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def online(home: Path) -> Asked:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    names = {repo for repo, revision in FILES if revision == "main"} | set(REFUSALS) | {"huge/config"}
    revisions = (
        "good/model@v2",
        "good/model@nope",
        "meta-llama/Llama-3.1-8B@v2",
        "bad--/id",
        "llama/llama-3.1-8b",
    )
    asked = ask(*sorted(names), *revisions, home=home, endpoint=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    asked.seen = server.seen
    return asked


def test_a_model_is_read_with_its_commit(online: Asked) -> None:
    assert online.answers["good/model"] == {
        "hidden": 48,
        "name": "good/model",
        "notes": [f"config.json of good/model from the Hugging Face Hub, commit {COMMIT['main']}"],
    }


def test_a_revision_is_respected(online: Asked) -> None:
    assert online.answers["good/model@v2"]["hidden"] == 96
    assert COMMIT["v2"] in online.answers["good/model@v2"]["notes"][0]
    assert online.answers["meta-llama/Llama-3.1-8B@v2"]["hidden"] == 48


def test_code_is_never_fetched(online: Asked) -> None:
    assert "never run" in online.answers["with/code"]["notes"][1]
    assert online.answers["own/code"]["error"] == "Unsupported"
    assert {path.rpartition("/")[2] for _, path in online.seen} == {"config.json"}
    assert ("GET", "/huge/config/resolve/main/config.json") not in online.seen


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("no/such", "UnknownName", "neither the catalog nor the Hub has it (or it is private)"),
        ("llama/llama-3.1-8b", "UnknownName", "did you mean "),
        ("a/private-one", "UnknownName", "or it is private"),
        ("a/gated-one", "RequestError", "a/gated-one is gated on the Hub: accept its terms"),
        ("a/gated-two", "RequestError", "a/gated-two is gated on the Hub: accept its terms"),
        ("good/model@nope", "RequestError", "good/model has no revision 'nope' on the Hub"),
        ("gguf/only", "RequestError", "gguf/only has no config.json on the Hub"),
        ("bad--/id", "RequestError", "is not a valid Hub id"),
        ("broken/json", "BadFile", "broken/json: not valid JSON"),
        ("huge/config", "BadFile", "huge/config: config.json is larger than 16 MB"),
        ("other/family", "Unsupported", "model_type 'falcon' is not modelled yet"),
    ],
)
def test_a_wrong_request_is_one_line(online: Asked, name: str, error: str, line: str) -> None:
    answer = online.answers[name]
    assert (answer["error"], answer["exit_code"]) == (error, 2)
    assert line in answer["line"]
    assert "\n" not in answer["line"]


@pytest.mark.parametrize("name", ["server/down", "server/forbids"])
def test_a_failing_hub_is_the_outside(online: Asked, name: str) -> None:
    answer = online.answers[name]
    assert (answer["error"], answer["exit_code"]) == ("OutsideError", 3)
    assert f"config.json of {name} is not in the Hub cache" in answer["line"]
    assert "\n" not in answer["line"]


def test_nothing_else_is_printed(online: Asked) -> None:
    assert online.stderr == ""


def test_the_cache_serves_when_the_hub_is_unreachable(online: Asked, home: Path) -> None:
    asked = ask("good/model", "good/model@v2", "new/model", home=home, endpoint="http://127.0.0.1:9")
    assert asked.answers["good/model"] == online.answers["good/model"]
    assert asked.answers["good/model@v2"] == online.answers["good/model@v2"]
    refused = asked.answers["new/model"]
    assert (refused["error"], refused["exit_code"]) == ("OutsideError", 3)
    assert "http://127.0.0.1:9 did not serve it" in refused["line"]
    assert asked.stderr == ""


def test_the_cache_serves_offline(online: Asked, home: Path) -> None:
    asked = ask("good/model", "new/model", home=home, endpoint="http://127.0.0.1:9", offline=True)
    assert asked.answers["good/model"] == online.answers["good/model"]
    refused = asked.answers["new/model"]
    assert (refused["error"], refused["exit_code"]) == ("OutsideError", 3)
    assert "HF_HUB_OFFLINE forbids to fetch it" in refused["line"]
    assert asked.stderr == ""


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("owner/name", True),
        ("owner/name-1.2_b@main", True),
        ("owner/name@refs/pr/1", True),
        ("name", False),
        ("a/b/c", False),
        ("owner/na me", False),
        ("owner/name@", False),
        ("https://huggingface.co/owner/name", False),
    ],
)
def test_what_reads_as_a_hub_id(name: str, is_id: bool) -> None:
    assert is_hub_id(name) is is_id
