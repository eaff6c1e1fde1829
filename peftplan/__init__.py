"""Will this fine-tune fit, what will it cost, and which configuration should I run? Answered without a GPU.

>>> from peftplan import estimate
>>> answer = estimate(model="llama-7b", method="qlora", micro_batch=1, seq_len=512)
>>> answer.parameters.trainable
4194304
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftplan.arch import load_arch
    from peftplan.arch.core import Arch
    from peftplan.breakdown import Saving, explain, savings
    from peftplan.budget import Check, Limits, check
    from peftplan.differences import Comparison, compare
    from peftplan.errors import OutsideError, PeftplanError, RequestError
    from peftplan.exporter import Exported, export
    from peftplan.job import Assumption, Job
    from peftplan.pipeline import estimate
    from peftplan.planner import Goal, Plan, plan
    from peftplan.result import Estimate, Term
    from peftplan.trainers import Run

__version__ = "0.1.0"

_HOMES = {
    "Arch": "peftplan.arch.core",
    "Assumption": "peftplan.job",
    "Check": "peftplan.budget",
    "Comparison": "peftplan.differences",
    "Estimate": "peftplan.result",
    "Goal": "peftplan.planner.goal",
    "Job": "peftplan.job",
    "Limits": "peftplan.budget",
    "OutsideError": "peftplan.errors",
    "PeftplanError": "peftplan.errors",
    "Plan": "peftplan.planner.result",
    "RequestError": "peftplan.errors",
    "Saving": "peftplan.breakdown",
    "Term": "peftplan.result",
    "Exported": "peftplan.exporter",
    "Run": "peftplan.trainers",
    "check": "peftplan.budget",
    "compare": "peftplan.differences",
    "estimate": "peftplan.pipeline",
    "export": "peftplan.exporter",
    "explain": "peftplan.breakdown",
    "load_arch": "peftplan.arch",
    "plan": "peftplan.planner.search",
    "savings": "peftplan.breakdown",
}

__all__ = [
    "Arch",
    "Assumption",
    "Check",
    "Comparison",
    "Estimate",
    "Exported",
    "Goal",
    "Job",
    "Limits",
    "OutsideError",
    "PeftplanError",
    "Plan",
    "RequestError",
    "Run",
    "Saving",
    "Term",
    "check",
    "compare",
    "estimate",
    "explain",
    "export",
    "load_arch",
    "plan",
    "savings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'peftplan' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
