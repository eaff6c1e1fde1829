"""What torch's own optimizers share: which implementation runs, and how its foreach kernels meet the weights."""

from __future__ import annotations

from typing import Literal

Impl = Literal["auto", "for-loop", "foreach", "fused"]
Loop = Literal["auto", "for-loop", "foreach"]
"""Of optimizers without a fused kernel."""


def resolved(impl: Impl, backend: str) -> Impl:
    """`auto` is torch's own choice: foreach on CUDA, for-loop on the CPU (_default_to_fused_or_foreach)."""
    if impl != "auto":
        return impl
    return "foreach" if backend == "cuda" else "for-loop"
