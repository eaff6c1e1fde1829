"""The whole pipeline on one screen: Job -> graph of one step -> memory, FLOPs, fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftplan.assemble import build_graph, trained
from peftplan.cost import price
from peftplan.errors import RequestError
from peftplan.fit import fit_reasons, judge_fit
from peftplan.graph.core import ADAPTER, Graph
from peftplan.graph.ops import Linear, PackedLinear
from peftplan.hardware import Gpu, find_gpu
from peftplan.hardware.gpus import usable_bytes
from peftplan.hardware.overheads import cuda_context, workspace_bytes
from peftplan.job import Assumption, Job, make_job
from peftplan.optimizers.base import Optimizer, Trained
from peftplan.pace import pace
from peftplan.reserve import usage
from peftplan.resolve import Case, resolve
from peftplan.result import (
    Estimate,
    Flops,
    Held,
    Late,
    Memory,
    Parameters,
)
from peftplan.step.clock import cache_bytes
from peftplan.step.memory import PhasePeak, StepMemory, run_step
from peftplan.step.walk import Rules
from peftplan.step.walk import exact as exact_size
from peftplan.step.work import Pass, passes
from peftplan.training_loop import average_sizes, step_bytes

VERSION = "0.1.0"


@dataclass(frozen=True, kw_only=True)
class Walked:
    """One step of a case on one GPU, before any clock, price or verdict."""

    case: Case
    graph: Graph
    weights: list[Trained]
    rules: Rules
    static: dict[str, int]
    """What lives between steps, by kind."""
    step: StepMemory
    existing_grad_bytes: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """An estimate with everything it was read from; `explain` and the tests look inside."""

    case: Case
    graph: Graph
    step: StepMemory
    rules: Rules
    static: dict[str, int]
    estimate: Estimate


def estimate(job: Job | None = None, **fields: Any) -> Estimate:
    """What one fine-tuning step needs and whether it fits.

    Takes a Job, or its fields: `estimate(model="llama-7b", method="qlora", gpu="rtx-4090")`. Raises RequestError
    where the request is wrong.
    """
    if job is not None and fields:
        raise RequestError(f"estimate() takes a Job or its fields, not both; put {', '.join(fields)} into the Job")
    return read(job if job is not None else make_job(**fields)).estimate


def walk(case: Case) -> Walked:
    """The graph of a case and one step over it."""
    graph = build_graph(case)
    rules = _rules(case)
    weights = trained(graph)
    static = _static(case, graph, weights, rules)
    existing = sum(rules.size(w.bytes) * w.copies for w in weights) if case.loop.grads_exist else 0
    step = run_step(
        graph,
        static_bytes=sum(static.values()),
        recompute=case.recompute,
        rules=rules,
        loop=case.loop,
        existing_grad_bytes=existing,
        entry_requires_grad=case.recompute.layers,
    )
    _optimizer_phase(case, step, weights)
    return Walked(
        case=case, graph=graph, weights=weights, rules=rules, static=static, step=step, existing_grad_bytes=existing
    )


def read(job: Job) -> Reading:
    """The estimate of a job with its workings."""
    case = resolve(job)
    walked = walk(case)
    graph, static, step = walked.graph, walked.static, walked.step
    gpu = find_gpu(case.job.gpu) if case.job.gpu is not None else None
    memory, device_notes = _on_device(case, graph, static, _memory(static, step, walked.existing_grad_bytes), gpu)
    runs = passes(step.segments, cache_bytes=cache_bytes(gpu) if gpu is not None else None)
    flops = _flops(runs)
    paced = pace(case, runs, flops, gpu, trained=walked.weights, state_bytes=static["state"])
    priced = price(case.job, paced.time, gpu)
    answer = Estimate(
        version=VERSION,
        job=case.job,
        parameters=_parameters(graph),
        memory=memory,
        flops=flops,
        time=paced.time,
        cost=priced.cost,
        assumptions=(
            *case.assumptions,
            *device_notes,
            *paced.notes,
            *priced.notes,
            *fit_reasons(gpu, on_device=_has_device(case, gpu)),
        ),
    ).judged(Late(lambda: judge_fit(gpu, memory.device_bytes)))
    return Reading(case=case, graph=graph, step=step, rules=walked.rules, static=static, estimate=answer)


def _rules(case: Case) -> Rules:
    if case.job.backend == "cpu":
        return Rules(size=exact_size)
    return Rules()


def _static(case: Case, graph: Graph, weights: list[Trained], rules: Rules) -> dict[str, int]:
    """What lives between steps, by kind."""
    size = rules.size
    kinds = {"weight": 0, "adapter": 0, "buffer": 0, "state": 0}
    for t, count in graph.params():
        kinds["adapter" if t.kind == ADAPTER else "weight"] += size(t.nbytes) * count
    kinds["buffer"] = sum(size(t.nbytes) for t in graph.buffers)
    kinds["state"] = state_bytes(case.optimizer, weights, rules, case.job.backend)
    kinds["average"] = sum(map(size, average_sizes(case.loop, graph, weights)))
    if case.job.backend == "cuda":
        kinds["workspace"] = _workspaces(case, graph)
    return kinds


def state_bytes(optimizer: Optimizer, weights: list[Trained], rules: Rules, backend: str = "cuda") -> int:
    """Optimizer states that live on the device between steps."""
    return sum(rules.size(s.bytes) * s.copies for s in optimizer.states(weights, backend) if not s.host)


def _workspaces(case: Case, graph: Graph) -> int:
    """cuBLAS and cuBLASLt workspaces, allocated by the first matrix products and kept."""
    return workspace_bytes(
        case.setup.numerics.capability,
        biased_linears=has_biased_linears(graph),
        recomputes=case.recompute.layers,
    )


def has_biased_linears(graph: Graph) -> bool:
    """Whether some linear layer adds a bias, which is what takes cuBLASLt into use."""
    linears = (op for r in graph.regions for op in r.ops if len(op.ins) > 2)
    return any(isinstance(op, (Linear, PackedLinear)) for op in linears)


def _optimizer_phase(case: Case, step: StepMemory, weights: list[Trained]) -> None:
    transient = step_bytes(case.loop, case.optimizer, weights, case.job.backend)
    step.phases["optimizer"] = PhasePeak(
        phase="optimizer", bytes=step.end_bytes + transient, saved_bytes=0, grad_bytes=step.grad_bytes, where="step"
    )


def _parameters(graph: Graph) -> Parameters:
    total = trainable = stored = 0
    for t, count in graph.params():
        total += t.numel * count
        trainable += t.numel * count * t.trainable
        stored += t.nbytes * count
    return Parameters(total=total, trainable=trainable, stored_bytes=stored)


def _memory(static: dict[str, int], step: StepMemory, kept_gradient_bytes: int) -> Memory:
    peak = step.peak
    kinds = {**static, "gradient": peak.grad_bytes, "activation": peak.saved_bytes}
    kinds["temporary"] = peak.bytes - sum(kinds.values())
    return Memory(
        peak_bytes=peak.bytes,
        static_bytes=step.static_bytes + kept_gradient_bytes,
        saved_for_backward_bytes=step.saved_for_backward_bytes,
        at_peak={k: v for k, v in kinds.items() if v},
        at_peak_phase=peak.phase,
        phases={
            "load": sum(size for kind, size in static.items() if kind in ("weight", "adapter", "buffer")),
            **{name: p.bytes for name, p in step.phases.items()},
        },
    )


def _flops(runs: Sequence[Pass]) -> Flops:
    forward, backward, again = (
        sum(run.flops for run in runs if run.name == name) for name in ("forward", "backward", "recompute")
    )
    return Flops(forward=forward, backward=backward, recompute=again, optimizer=0, total=forward + backward + again)


def _has_device(case: Case, gpu: Gpu | None) -> bool:
    """Whether there is a device whose allocator is modelled: NVIDIA's, and AMD's as if it were."""
    return case.job.backend == "cuda" and (gpu is None or gpu.vendor in ("NVIDIA", "AMD"))


def _on_device(
    case: Case, graph: Graph, static: dict[str, int], memory: Memory, gpu: Gpu | None
) -> tuple[Memory, tuple[Assumption, ...]]:
    """The memory section with what must fit on the card; null on the cpu backend."""
    if not _has_device(case, gpu):
        why = "the cpu backend uses no device"
        if gpu is not None and case.job.backend == "cuda":
            why = f"how {gpu.vendor} devices hold memory is not modelled; the bytes of tensors are"
        return memory, (Assumption(what="memory.device_bytes", value=None, why=why),)
    context = cuda_context(gpu.capability if gpu is not None else None)

    def held() -> Held:
        card = usable_bytes(gpu).bytes if gpu is not None else None
        limit = card - context.bytes if card is not None else None
        reserved = usage(case, graph, static.get("workspace", 0), capacity_bytes=limit).peak_reserved_bytes
        return Held(reserved, reserved + context.bytes)

    notes = [Assumption(what="allocator", value="CUDA", why="ROCm's allocator and context are taken for CUDA's")]
    if gpu is None or gpu.vendor == "NVIDIA":
        notes.clear()
    note = Assumption(what="context_bytes", value=context.bytes, why=f"{context.standing}; errs {context.errs}")
    return memory.holding(Late(held)), (note, *notes)
