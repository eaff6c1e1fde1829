"""Where the bytes of an estimate come from, and what would lower its peak most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peftplan.errors import RequestError
from peftplan.graph.core import ADAPTER, Op, Tensor
from peftplan.job import Job
from peftplan.pipeline import Reading, read
from peftplan.result import Estimate, Term


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """One change to a job that lowers its peak."""

    change: str
    job: Job
    saved_bytes: int
    peak_bytes: int


def explain(job: Job) -> tuple[Term, ...]:
    """The terms of the peak; they sum to `memory.peak_bytes`, kind by kind as `memory.at_peak`."""
    reading = read(job)
    terms = [*_weights(reading), *_states(reading), *_activations(reading), *_moment(reading)]
    return tuple(term for term in terms if term.bytes)


# -- what lives between steps -----------------------------------------------------------------------------------

_ROOMS = (("self_attn", "attention projections"), ("mlp", "feed-forward projections"), ("embed", "embedding"),
          ("lm_head", "output head"), ("norm", "norms"))  # fmt: skip


def _weights(reading: Reading) -> Iterator[Term]:
    size, taken = reading.rules.size, reading.case.format.held_bytes
    groups: dict[tuple[str, str], list[tuple[Tensor, int]]] = {}
    for t, count in reading.graph.params():
        kind = "adapter" if t.kind == ADAPTER else "weight"
        groups.setdefault((kind, _room(t.name)), []).append((t, count))
    for (kind, room), members in groups.items():
        total = sum(taken(t, size) * n for t, n in members)
        elements = sum(t.numel * n for t, n in members)
        held = sorted({_held_as(t) for t, _ in members})
        source = "shapes of the model's config.json" if kind == "weight" else "the method's own parameters"
        formula = f"{elements:,} parameters as {', '.join(held)}"
        yield Term(name=room, bytes=total, kind=kind, formula=formula, source=source)


def _room(name: str) -> str:
    plain = name.removeprefix("@")
    if "lora_" in plain or ".saved." in plain:
        return "adapter of " + plain.split(".lora_")[0].split(".saved.")[0]
    for mark, room in _ROOMS:
        if mark in plain and not (mark == "self_attn" and "norm" in plain):
            return room
    return "norms"


def _held_as(t: Tensor) -> str:
    return t.dtype.label if t.stored_bytes is None else f"packed at {t.nbytes / t.numel:.4g} bytes"


def _states(reading: Reading) -> Iterator[Term]:
    optimizer = reading.case.job.optimizer
    for kind, formula, source in (
        ("state", f"{optimizer}: states of {_remembered(reading):,} trained parameters",
         "the optimizer's init_state"),
        ("average", "moving average of weights", "loop.ema"),
        ("buffer", "rotary frequencies and scales", "non-persistent buffers of the model"),
        ("workspace", "cuBLAS handles of the forward and the autograd thread", "torch, CUDABlas workspaces"),
    ):  # fmt: skip
        yield Term(name=_NAMES[kind], bytes=reading.static.get(kind, 0), kind=kind, formula=formula, source=source)


def _remembered(reading: Reading) -> int:
    return sum(t.numel * count for t, count in reading.case.method.remembered(reading.graph).params() if t.trainable)


_NAMES = {
    "state": "optimizer states",
    "average": "average of weights",
    "buffer": "buffers",
    "workspace": "library workspaces",
}


# -- what the step adds -----------------------------------------------------------------------------------------


def _activations(reading: Reading) -> Iterator[Term]:
    at_peak = reading.estimate.memory.at_peak.get("activation", 0)
    ops = {op.name: op for part in reading.step.segments for op in part.region.ops}
    groups: dict[tuple[str, str], tuple[int, int, Tensor, Op | None]] = {}
    for saved, count in reading.step.saved:
        key = (saved.tensor.name, saved.op)
        total, n, _, _ = groups.get(key, (0, 0, saved.tensor, None))
        groups[key] = (total + reading.rules.size(saved.bytes) * count, n + count, saved.tensor, ops.get(saved.op))
    listed = 0
    for (name, op_name), (total, n, tensor, op) in groups.items():
        listed += total
        shape = " x ".join(map(str, tensor.shape)) or "1"
        yield Term(
            name=name.removeprefix("@"),
            bytes=total,
            kind="activation",
            formula=f"{n} x ({shape}) x {tensor.dtype.size} B",
            source=_source(op, op_name),
        )
    yield Term(
        name="kept or released by then",
        bytes=at_peak - listed,
        kind="activation",
        formula="difference between the end of the forward and the moment of the peak",
        source="the order of the step",
    )


def _source(op: Op | None, name: str) -> str:
    if op is None:
        return "torch.utils.checkpoint: a layer's arguments" if name == "checkpoint" else name
    return (type(op).__doc__ or "").split("\n")[0].strip()


def _moment(reading: Reading) -> Iterator[Term]:
    memory = reading.estimate.memory
    where, stage = reading.step.peak.where, reading.case.method.stage
    yield Term(
        name="gradients of trained parameters",
        bytes=memory.at_peak.get("gradient", 0),
        kind="gradient",
        formula="one of each trained parameter's dtype and shape, as far as backward has come"
        + (f", while {stage} train" if stage else ""),
        source="torch autograd, AccumulateGrad",
    )
    yield Term(
        name=f"alive for the moment, at {where}",
        bytes=memory.at_peak.get("temporary", 0),
        kind="temporary",
        formula="values and gradients in flight, the batch, the model's output",
        source="the step's timeline",
    )


# -- what would help --------------------------------------------------------------------------------------------


def savings(job: Job, answer: Estimate, *, most: int = 3) -> tuple[Saving, ...]:
    """The changes of one choice that lower the peak most, best first."""
    found = []
    for change, update in _candidates(answer.job):
        try:
            changed = job.model_copy(update=update)
            peak = read(changed).estimate.memory.peak_bytes
        except RequestError:
            continue
        saved = answer.memory.peak_bytes - peak
        if saved > 0:
            found.append(Saving(change=change, job=changed, saved_bytes=saved, peak_bytes=peak))
    return tuple(sorted(found, key=lambda s: (-s.saved_bytes, s.change))[:most])


def _candidates(job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    if job.recompute == "none":
        yield "--recompute full", {"recompute": "full"}
    if job.micro_batch > 1:
        half = next(size for size in range(job.micro_batch // 2, 0, -1) if job.micro_batch % size == 0)
        yield (
            f"--micro-batch {half} --grad-accum {job.grad_accum * job.micro_batch // half}",
            {"micro_batch": half, "grad_accum": job.grad_accum * job.micro_batch // half},
        )
    if job.seq_len is not None and job.seq_len > 256:
        yield f"--seq-len {job.seq_len // 2}", {"seq_len": job.seq_len // 2}
    if job.method in ("full", "freeze"):
        yield "--method lora", {"method": "lora"}
    elif job.format not in ("nf4", "fp4"):
        yield "--method qlora", {"method": "qlora", "format": None, "dtype": None}
    if job.optimizer in ("adamw", "adamw_torch", "adamw_torch_fused"):
        yield "--optimizer paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}
    if job.attention == "eager":
        yield "--attention sdpa", {"attention": "sdpa"}
    if job.recompute == "none" and job.settings.get("model.use_cache") is None:
        yield "--set model.use_cache=false", {"settings": {**job.settings, "model.use_cache": False}}
