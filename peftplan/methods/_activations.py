"""Activation functions between the halves of a branch, by what autograd keeps of them."""

from __future__ import annotations

from peftplan.errors import Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor

KEEPS_RESULT = ("relu", "tanh", "sigmoid")
KEEPS_INPUT = ("silu", "swish", "gelu")


def check_activation(setting: str, name: str) -> None:
    """Raises Unsupported for a function that is not modelled."""
    if name not in (*KEEPS_RESULT, *KEEPS_INPUT):
        known = ", ".join((*KEEPS_RESULT, "silu"))
        raise Unsupported(f"method.{setting}={name} is not modelled; use {known} or gelu")


def active(b: Builder, x: Tensor, name: str, label: str = "act") -> Tensor:
    return b.squash(x, label=label) if name in KEEPS_RESULT else b.activate(x, label=label)
