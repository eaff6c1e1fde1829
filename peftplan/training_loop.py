"""What the training loop does around forward and backward: its optimizer, clipping, averages, and what outlives a step.

`loop.*` settings: `outputs_until` (see step.memory.Loop); `max_grad_norm`, the norm that all gradients together are
clipped to before the step (torch.nn.utils.clip_grad_norm_; 0 for none, the default here); `ema`, a moving average of
weights: `trained` (a copy of each trained weight, as diffusers' EMAModel shadows them) or `model` (a copy of the whole
model, as torch.optim.swa_utils.AveragedModel).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from peftplan import methods, optimizers
from peftplan.errors import RequestError, UnknownName
from peftplan.graph.core import Graph, Region, Tensor
from peftplan.job import Job
from peftplan.methods import Method
from peftplan.optimizers import Optimizer
from peftplan.optimizers.base import Trained
from peftplan.plugins import canonical
from peftplan.step.segments import Loop
from peftplan.step.walk import InBackward

UNTIL = ("loss", "step", "next")
EMA = ("none", "trained", "model")
_SETTINGS = ("outputs_until", "max_grad_norm", "ema")
_COUNTER = 8
"""AveragedModel's n_averaged, an int64."""


# -- the optimizer ----------------------------------------------------------------------------------------------------


def usual_optimizer(job: Job) -> tuple[str, str]:
    """(name, why) of the optimizer where the job names none: that of a method's name, such as galore."""
    own = _own(job)
    if own is None:
        return "adamw", "torch.optim.AdamW, transformers' default"
    return own, f"{job.method} is full fine-tuning with it"


def own_optimizer(job: Job) -> str | None:
    """The name of the optimizer that the method's name stands for, as the job has it; None for other methods."""
    own = _own(job)
    if own is None or job.optimizer is None or optimizers.get(job.optimizer) is not optimizers.get(own):
        return own
    return job.optimizer


def projection(job: Job) -> str | None:
    """The optimizer of a method's name that has a rank and targets of its own: of galore, not of lomo."""
    name = _own(job)
    return name if name is not None and "rank" in optimizers.get(name).__dataclass_fields__ else None


def optimizer_of(job: Job) -> Optimizer:
    """The optimizer with its settings. Raises RequestError where it contradicts the method's name."""
    own = _own(job)
    if own is not None and job.optimizer is not None and optimizers.get(job.optimizer) is not optimizers.get(own):
        raise RequestError(f"--optimizer {job.optimizer} contradicts --method {job.method}; leave it out or use full")
    knobs = job.knobs("optimizer")
    if projection(job) is not None:
        asked = {"rank": job.rank, "optim_target_modules": job.target_modules}
        knobs |= {key: value for key, value in asked.items() if value is not None}
    return optimizers.make(job.optimizer or usual_optimizer(job)[0], knobs)


def _own(job: Job) -> str | None:
    return None if canonical(job.method) in ("qlora", "qdora") else methods.optimizer_of(job.method)


# -- the loop ---------------------------------------------------------------------------------------------------------


def loop_of(job: Job, optimizer: Optimizer, method: Method) -> Loop:
    """What the loop itself does to memory. Raises RequestError for what cannot be together."""
    knobs = job.knobs("loop")
    for key in knobs:
        if key not in _SETTINGS:
            raise UnknownName("setting of loop", key, _SETTINGS)
    until = _one_of("outputs_until", knobs.get("outputs_until", "step"), UNTIL)
    ema = _one_of("ema", knobs.get("ema", "none"), EMA)
    clips = _clips(knobs.get("max_grad_norm", 0))
    if not method.backward:
        if job.grad_accum > 1:
            raise RequestError(
                f"--grad-accum {job.grad_accum}: method {job.method} takes one batch a step; use --micro-batch"
            )
        return Loop(outputs_until="loss", again=method.forwards > 1, ema=ema)
    if not optimizer.frees_gradients:
        return Loop(outputs_until=until, grads_exist=job.grad_accum > 1, clips=clips, ema=ema)
    if job.grad_accum > 1 and not optimizer.late:
        raise RequestError(f"{job.optimizer} lets gradients go in backward, so none accumulate; use --grad-accum 1")
    if clips:
        raise RequestError(
            f"loop.max_grad_norm: {job.optimizer} lets gradients go before their norm is known; set it to 0"
        )

    def scratch_bytes(weight: Tensor, region: Region) -> int | None:
        return optimizer.update_bytes(Trained.of(weight, region), job.backend)

    return Loop(outputs_until=until, in_backward=InBackward(scratch_bytes=scratch_bytes, late=optimizer.late), ema=ema)


def _one_of(name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise UnknownName(f"loop.{name}", str(value), known)
    return str(value)


def _clips(norm: Any) -> bool:
    if isinstance(norm, bool) or not isinstance(norm, (int, float)) or norm < 0:
        raise RequestError(f"loop.max_grad_norm={norm!r}: give a number, 0 for no clipping")
    return norm > 0


# -- what it holds and makes ------------------------------------------------------------------------------------------


def clipping_bytes(weights: Sequence[Trained]) -> int:
    """The most that clipping makes: each gradient's norm and all of them stacked (get_total_norm), then the total and
    the factor; gradients are scaled in place."""
    each = sum(w.dtype.size * w.copies for w in weights)
    return 2 * each + max((w.dtype.size for w in weights), default=0)


def average_sizes(loop: Loop, graph: Graph, weights: Sequence[Trained]) -> Iterator[int]:
    """Bytes of every tensor of the weights' moving average."""
    if loop.ema == "trained":
        yield from (w.bytes for w in weights for _ in range(w.copies))
    if loop.ema == "model":
        yield from (t.nbytes for t, count in graph.params() for _ in range(count))
        yield from (t.nbytes for t in graph.buffers)
        yield _COUNTER
