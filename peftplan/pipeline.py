"""The whole pipeline on one screen: Job -> graph of one step -> memory, FLOPs, fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftplan.assemble import Trainees, as_run, build_graph, state_bytes, step_bytes, trainees
from peftplan.cost import price
from peftplan.errors import RequestError
from peftplan.fit import fit_reasons, judge_fit
from peftplan.graph.core import ADAPTER, Graph
from peftplan.graph.ops import Linear, PackedLinear
from peftplan.hardware import Gpu, find_gpu
from peftplan.hardware.gpus import usable_bytes
from peftplan.hardware.overheads import cuda_context, workspace_bytes
from peftplan.job import Assumption, Job, make_job
from peftplan.layouts.units import Before
from peftplan.optimizers.base import Trained
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
from peftplan.spread import BEFORE, Spread, spread
from peftplan.step.clock import cache_bytes
from peftplan.step.memory import PhasePeak, StepMemory, run_step
from peftplan.step.walk import Rules
from peftplan.step.walk import exact as exact_size
from peftplan.step.work import Pass, passes
from peftplan.training_loop import average_sizes

VERSION = "0.1.0"


@dataclass(frozen=True, kw_only=True)
class Walked:
    """One step of a case on one GPU, before any clock, price or verdict."""

    case: Case
    graph: Graph
    trainees: Trainees
    rules: Rules
    static: dict[str, int]
    """What lives between steps, by kind."""
    step: StepMemory
    existing_grad_bytes: int
    rank: Spread | None = None
    """What its layout makes of its weights, where replicas share them."""


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
    """The graph of a case and one step over it; of a method that goes through stages, the one with the highest peak."""
    stages = case.method.stages(case.arch)
    if stages == (case.method,):
        return _walk(case)
    walked = [_walk(replace(case, method=stage)) for stage in stages]
    worst = max(walked, key=lambda one: one.step.peak.bytes)
    lowest = min(walked, key=lambda one: one.step.peak.bytes)
    why = f"what trains changes; this is when the peak is highest, the lowest of {len(stages)} stages looked at is"
    note = Assumption(
        what="stage",
        value=worst.case.method.stage,
        why=f"{why} {lowest.step.peak.bytes:,} bytes, with {lowest.case.method.stage}" if len(stages) > 1
        else "the only one it has, or sure to be the one with the highest peak",
    )  # fmt: skip
    return replace(worst, case=replace(worst.case, assumptions=(*case.assumptions, note)))


def _walk(case: Case) -> Walked:
    graph = build_graph(case)
    rules = _rules(case)
    rank = spread(case, graph)
    train = rank.trainees if rank is not None else trainees(case, graph)
    static = _static(case, graph, train, rules, rank)
    before = rank.gradients_before(case.loop) if rank is not None else BEFORE[case.loop.grads_exist]
    existing = _existing(graph, train, rules, rank, before)
    step = run_step(
        as_run(case, graph),
        static_bytes=sum(static.values()),
        recompute=case.recompute,
        rules=rules,
        loop=replace(case.loop, grads_exist=before == "whole") if rank is not None else case.loop,
        existing_grad_bytes=existing,
        entry_requires_grad=case.recompute.layers,
        sharding=rank.sharding(before) if rank is not None else None,
    )
    _optimizer_phase(case, step, train, rules)
    _between(case, step, graph, rules)
    return Walked(
        case=case,
        graph=graph,
        trainees=train,
        rules=rules,
        static=static,
        step=step,
        existing_grad_bytes=existing,
        rank=rank,
    )


def _existing(graph: Graph, train: Trainees, rules: Rules, rank: Spread | None, before: Before) -> int:
    """Bytes of the gradients of micro-batches before."""
    if before == "none":
        return 0
    if rank is None:
        return _gradients(graph, train.weights, rules)
    return sum(map(rules.size, rank.gradients(before)))


def read(job: Job) -> Reading:
    """The estimate of a job with its workings."""
    walked = walk(resolve(job))
    case, graph, static, step = walked.case, walked.graph, walked.static, walked.step
    gpu = find_gpu(case.job.gpu) if case.job.gpu is not None else None
    memory, device_notes = _on_device(walked, _memory(static, step, walked.existing_grad_bytes), gpu)
    runs = passes(
        step.segments, cache_bytes=cache_bytes(gpu) if gpu is not None else None, forwards=case.method.forwards
    )
    flops = _flops(runs)
    paced = pace(case, runs, flops, gpu, trained=walked.trainees.weights, state_bytes=static["state"])
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
            *(Assumption(what=what, value=value, why=why) for what, value, why in case.method.remarks(graph)),
            *device_notes,
            *paced.notes,
            *priced.notes,
            *fit_reasons(gpu, on_device=_has_device(case, gpu)),
        ),
    ).judged(Late(lambda: judge_fit(gpu, memory.device_bytes, packed=case.format.packed)))
    return Reading(case=case, graph=graph, step=step, rules=walked.rules, static=static, estimate=answer)


def _rules(case: Case) -> Rules:
    if case.job.backend == "cpu":
        return Rules(size=exact_size)
    return Rules()


def _static(case: Case, graph: Graph, train: Trainees, rules: Rules, rank: Spread | None) -> dict[str, int]:
    """What lives between steps, by kind."""
    size = rules.size
    kinds = {"weight": 0, "adapter": 0, "buffer": 0, "state": 0}
    if rank is None:
        for t, count in graph.params():
            kinds["adapter" if t.kind == ADAPTER else "weight"] += size(t.nbytes) * count
    else:
        for one in rank.held:
            kinds[one.kind] += sum(map(size, one.sizes)) * one.times
        kinds["bucket"] = sum(map(size, rank.buffers))
    kinds["buffer"] = sum(size(t.nbytes) for t in graph.buffers)
    kinds["state"] = state_bytes(case.optimizer, train, rules.size, case.job.backend)
    kinds["average"] = sum(map(size, average_sizes(case.loop, graph, train.weights)))
    if case.job.backend == "cuda":
        kinds["workspace"] = _workspaces(case, graph)
    return kinds


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


def _gradients(graph: Graph, weights: list[Trained], rules: Rules) -> int:
    """Bytes of all gradients between micro-batches; one that is a view of a larger tensor's keeps that whole."""
    wholes = 0
    for region in graph.regions:
        for op in region.ops:
            parts = [t for t in op.ins if t.trainable and t.dtype is op.out.dtype] if op.narrows else []
            if parts:
                apart = sum(rules.size(t.logical_bytes) for t in parts)
                wholes += (rules.size(op.out.nbytes) - apart) * region.count
    return sum(rules.size(w.bytes) * w.copies for w in weights) + wholes


def _optimizer_phase(case: Case, step: StepMemory, train: Trainees, rules: Rules) -> None:
    transient = step_bytes(case.optimizer, train, rules.size, case.job.backend, clips=case.loop.clips)
    step.phases["optimizer"] = PhasePeak(
        phase="optimizer", bytes=step.end_bytes + transient, saved_bytes=0, grad_bytes=step.grad_bytes, where="step"
    )


def _between(case: Case, step: StepMemory, graph: Graph, rules: Rules) -> None:
    """What the method does between two steps, when gradients and activations are gone."""
    made = case.method.between(graph)
    if made:
        total = step.static_bytes + sum(map(rules.size, made))
        step.phases["between"] = PhasePeak(phase="between", bytes=total, saved_bytes=0, grad_bytes=0, where="two steps")


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


def _on_device(walked: Walked, memory: Memory, gpu: Gpu | None) -> tuple[Memory, tuple[Assumption, ...]]:
    """The memory section with what must fit on the card; null on the cpu backend."""
    case, graph, static, rank = walked.case, walked.graph, walked.static, walked.rank
    if not _has_device(case, gpu):
        why = "the cpu backend uses no device"
        if gpu is not None and case.job.backend == "cuda":
            why = f"how {gpu.vendor} devices hold memory is not modelled; the bytes of tensors are"
        return memory, (Assumption(what="memory.device_bytes", value=None, why=why),)
    context = cuda_context(gpu.capability if gpu is not None else None)

    def held() -> Held:
        card = usable_bytes(gpu).bytes if gpu is not None else None
        limit = card - context.bytes if card is not None else None
        workspace = static.get("workspace", 0)
        reserved = usage(case, graph, workspace, capacity_bytes=limit, rank=rank).peak_reserved_bytes
        return Held(reserved, reserved + context.bytes)

    notes = [Assumption(what="allocator", value="CUDA", why="ROCm's allocator and context are taken for CUDA's")]
    if gpu is None or gpu.vendor == "NVIDIA":
        notes.clear()
    note = Assumption(what="context_bytes", value=context.bytes, why=f"{context.standing}; errs {context.errs}")
    return memory.holding(Late(held)), (note, *notes)
