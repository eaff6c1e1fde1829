"""Wall time of a cold `peftplan estimate` beside a cold `accelerate estimate-memory`, taking turns.

    python benchmarks/cold_start.py [--repetitions 7]

Exits 1 where the median of peftplan is more than a tenth of accelerate's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from peftplan.arch.catalog import find_model

MODEL, HUB_ID = "llama-7b", "huggyllama/llama-7b"
OURS = [sys.executable, "-m", "peftplan.cli", "estimate", "--model", MODEL, "--method", "lora", "--json"]
THEIRS = [
    *[sys.executable, "-m", "accelerate.commands.accelerate_cli", "estimate-memory"],
    *[HUB_ID, "--library_name", "transformers"],
]
ALLOWED_SHARE = 0.1


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as accelerate asks for: the model's page and its config.json."""

    config = json.dumps(dict(find_model(MODEL).config)).encode()

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def _answer(self, *, with_body: bool) -> None:
        body = self._body(self.path.partition("?")[0])
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if with_body and body is not None:
            self.wfile.write(body)

    def _body(self, path: str) -> bytes | None:
        if path == f"/api/models/{HUB_ID}":
            page = {"id": HUB_ID, "config": json.loads(self.config), "library_name": "transformers"}
            return json.dumps({**page, "tags": [], "siblings": [{"rfilename": "config.json"}]}).encode()
        return self.config if path.endswith("/config.json") else None


@contextmanager
def served() -> Iterator[dict[str, str]]:
    """The environment in which the Hub is this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    with tempfile.TemporaryDirectory() as cache:
        yield {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": cache, "NO_PROXY": "127.0.0.1"}
    server.shutdown()


def seconds(command: list[str], environment: Mapping[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    repetitions = parser.parse_args().repetitions
    with served() as environment:
        seconds(OURS, environment), seconds(THEIRS, environment)  # both byte-compiled, both caches filled
        turns = [(seconds(OURS, environment), seconds(THEIRS, environment)) for _ in range(repetitions)]
    ours, theirs = (statistics.median(column) for column in zip(*turns, strict=True))
    for turn in turns:
        print("peftplan {:6.3f} s   accelerate {:6.3f} s".format(*turn))
    print(f"median   {ours:6.3f} s              {theirs:6.3f} s   share {ours / theirs:.3f}")
    return 0 if ours <= ALLOWED_SHARE * theirs else 1


if __name__ == "__main__":
    sys.exit(main())
