"""AdamW (Loshchilov 2019, arXiv:1711.05101) as torch.optim.AdamW runs it: two states of each weight's own dtype.

Mirrors torch 2.13, torch/optim/adam.py: _single_tensor_adam (`for-loop`) makes sqrt(v) and its quotient per weight,
_multi_tensor_adam (`foreach`) makes sqrt(v) of all weights of one dtype at once, _fused_adam makes nothing.
bf16 weights have bf16 states and no master copy. The step counter is a 4-byte tensor per weight, on the host unless
fused.

`master_weights`: half-precision weights have an fp32 copy that the step works on, with fp32 states, and fp32 copies of
all gradients during the step (Apex, apex/fp16_utils/fp16_optimizer.py, FP16_Optimizer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from peftplan.optimizers.base import Locals, Optimizer, State, Trained, each_and_step, foreach_bytes
from peftplan.units import DType

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw_torch": {},
    "adamw_torch_foreach": {"impl": "foreach"},
    "adamw_torch_fused": {"impl": "fused"},
    "adamw_fused": {"impl": "fused"},
    "adamw_foreach": {"impl": "foreach"},
    "adamw_for_loop": {"impl": "for-loop"},
    "adamw_apex_fused": {"impl": "fused"},
    "adamw_master_weights": {"master_weights": True},
}


@final
@dataclass(frozen=True)
class AdamW(Optimizer):
    impl: Literal["auto", "for-loop", "foreach", "fused"] = "auto"
    """auto: torch's own choice, foreach on CUDA, for-loop on CPU."""
    amsgrad: bool = False
    master_weights: bool = False
    """Keep fp32 copies of half-precision weights, and fp32 states."""

    def resolved(self, backend: str) -> str:
        if self.impl != "auto":
            return self.impl
        return "foreach" if backend == "cuda" else "for-loop"

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        step_on_host = backend == "cuda" and self.resolved(backend) != "fused"
        worked_on = [self._master(w) for w in weights]
        yield from each_and_step(worked_on, count=2 + self.amsgrad, step_on_host=step_on_host)
        for w, master in zip(weights, worked_on, strict=True):
            if master is not w:
                yield State(master.bytes, w.copies)

    def _master(self, w: Trained) -> Trained:
        return w._replace(dtype=DType.float32) if self.master_weights and w.dtype.is_half else w

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        how = self.resolved(backend)
        worked_on = [self._master(w) for w in weights]
        copied = sum(m.bytes * m.copies for w, m in zip(weights, worked_on, strict=True) if m is not w)
        if how == "fused":
            return copied
        return copied + (foreach_bytes(worked_on) if how == "foreach" else super().step_bytes(worked_on, backend))

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        """`denom = (v.sqrt() / c).add_(eps)`: the root, the quotient, and the denominator of the weight before."""
        del backend
        local.bind("denom", w.bytes, beside=w.bytes)


OPTIMIZER = AdamW
EXAMPLES = (
    AdamW(),
    AdamW(impl="fused"),
    AdamW(impl="foreach"),
    AdamW(impl="for-loop"),
    AdamW(amsgrad=True),
    AdamW(master_weights=True),
    AdamW(in_backward=True),
)
UNVERIFIED: dict[str, str] = {}
