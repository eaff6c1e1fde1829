"""Runs in the environment of `adapters`: jobs on stdin, and on stdout what the trace of each counts."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from peftplan.instruments.answer import Trace
from peftplan.instruments.trace import trace
from peftplan.job import make_job


def numbers(real: Trace) -> dict[str, int]:
    """What of a trace an estimate is held to."""
    return {
        "total": real.parameters["total"],
        "trainable": real.parameters["trainable"],
        "stored": real.parameters["stored_bytes"],
        "static": real.static_bytes,
        "saved": real.saved_for_backward_bytes,
        **{kind: real.flops[kind] for kind in ("forward", "backward", "recompute")},
        "peak": real.peak_bytes,
    }


def main() -> None:
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for fields in json.load(sys.stdin):
        real = trace(make_job(**fields))
        found.append({"numbers": numbers(real), "versions": real.versions})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
