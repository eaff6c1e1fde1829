"""Answers jobs with whatever peftplan is on the path: a list of jobs on standard input, a list of answers on output.

Run as a file, so that nothing of today's tests is needed beside an older peftplan.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from peftplan import estimate

LATE = ("memory.reserved_bytes", "memory.device_bytes")
"""What takes a replay of the allocator: asked of those jobs only that say so."""
QUANTITIES = (
    "parameters.total", "parameters.trainable", "parameters.stored_bytes", "memory.peak_bytes", "memory.static_bytes",
    "memory.saved_for_backward_bytes", "flops.total", "time.step_seconds.expected",
)  # fmt: skip


def answer(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Every quantity of one job, or the line that refuses it."""
    try:
        found = estimate(**fields)
        return {name: _value(found, name) for name in names}
    except Exception as error:  # an older one may fail in any way
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


def _value(found: Any, name: str) -> Any:
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    json.dump([answer(job, (*QUANTITIES, *(LATE if late else ()))) for job, late in asked], sys.stdout)
