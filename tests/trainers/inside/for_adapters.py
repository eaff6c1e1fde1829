"""Runs in the environment of `adapters`: jobs on stdin, and on stdout what the trace of each counts."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from peftplan.instruments.trace import trace
from peftplan.job import make_job
from tests.oracles.equal import traced


def main() -> None:
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for fields in json.load(sys.stdin):
        real = trace(make_job(**fields))
        found.append({"numbers": traced(real), "versions": real.versions})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
