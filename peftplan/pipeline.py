"""The whole pipeline on one screen: Job -> graph of one step -> memory, FLOPs, fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftplan.cost import price
from peftplan.device import has_biased_linears, on_device
from peftplan.fit import judge_fit
from peftplan.graph.blocks.decoder import decoder, module_order
from peftplan.graph.core import ADAPTER, Graph, is_global
from peftplan.hardware import Gpu, find_gpu
from peftplan.hardware.overheads import workspace_bytes
from peftplan.job import Job, make_job
from peftplan.optimizers.base import Trained
from peftplan.pace import pace
from peftplan.resolve import Case, resolve
from peftplan.result import (
    Assumption,
    Estimate,
    Flops,
    Memory,
    Parameters,
)
from peftplan.step.memory import PhasePeak, StepMemory, run_step
from peftplan.step.walk import Rules, recompute_flops, region_flops
from peftplan.step.walk import exact as exact_size

VERSION = "0.1.0"


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
    return read(job if job is not None else make_job(**fields)).estimate


def read(job: Job) -> Reading:
    """The estimate of a job with its workings."""
    case = resolve(job)
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
    _optimizer_phase(case, step, weights, rules)
    gpu = find_gpu(case.job.gpu) if case.job.gpu is not None else None
    memory, device_notes = _on_device(case, _memory(static, step), gpu)
    flops = _flops(case, step)
    paced = pace(case, step, flops, gpu, trained=weights, state_bytes=static["state"])
    priced = price(case.job, paced.time, gpu)
    judged = judge_fit(gpu, device_bytes=memory.device_bytes, reserved_known=memory.reserved_bytes is not None)
    answer = Estimate(
        version=VERSION,
        job=case.job,
        parameters=_parameters(graph),
        memory=memory,
        flops=flops,
        time=paced.time,
        cost=priced.cost,
        fit=judged.fit,
        assumptions=(*case.assumptions, *device_notes, *paced.notes, *priced.notes, *judged.notes),
    )
    return Reading(case=case, graph=graph, step=step, rules=rules, static=static, estimate=answer)


def build_graph(case: Case) -> Graph:
    """Architecture -> graph -> format -> method: bases are packed when loaded, adapters come on top."""
    graph = decoder(case.arch, case.setup)
    graph = case.format.apply(graph, case.compute, case.setup.numerics)
    return case.method.apply(graph, case.host)


def _rules(case: Case) -> Rules:
    if case.job.backend == "cpu":
        return Rules(size=exact_size)
    return Rules()


def trained(graph: Graph) -> list[Trained]:
    """Trainable weights in the order an optimizer sees them, neighbours in a layer as neighbours."""
    found: list[Trained] = []
    seen: set[str] = set()
    for region in graph.regions:
        mine = [t for t in region.params() if t.trainable and t.name not in seen]
        seen.update(t.name for t in mine if is_global(t.name))
        found.extend(Trained(t.numel, t.dtype, region.count) for t in sorted(mine, key=lambda t: module_order(t.name)))
    return found


def _static(case: Case, graph: Graph, weights: list[Trained], rules: Rules) -> dict[str, int]:
    """What lives between steps, by kind."""
    size = rules.size
    kinds = {"weight": 0, "adapter": 0, "buffer": 0, "state": 0}
    for t, count in graph.params():
        kinds["adapter" if t.kind == ADAPTER else "weight"] += size(t.nbytes) * count
    kinds["buffer"] = sum(size(t.nbytes) for t in graph.buffers)
    states = case.optimizer.states(weights, case.job.backend)
    kinds["state"] = sum(size(s.bytes) * s.copies for s in states if not s.host)
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


def _optimizer_phase(case: Case, step: StepMemory, weights: list[Trained], rules: Rules) -> None:
    transient = case.optimizer.step_bytes(weights, case.job.backend)
    del rules
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


def _memory(static: dict[str, int], step: StepMemory) -> Memory:
    peak = step.peak
    kinds = {**static, "gradient": peak.grad_bytes, "activation": peak.saved_bytes}
    kinds["temporary"] = peak.bytes - sum(kinds.values())
    return Memory(
        peak_bytes=peak.bytes,
        reserved_bytes=None,
        device_bytes=None,
        static_bytes=step.static_bytes,
        saved_for_backward_bytes=step.saved_for_backward_bytes,
        at_peak={k: v for k, v in kinds.items() if v},
        at_peak_phase=peak.phase,
        phases={name: p.bytes for name, p in step.phases.items()},
    )


def _flops(case: Case, step: StepMemory) -> Flops:
    forward = backward = again = 0
    for part in step.segments:
        ahead, back = region_flops(part.region, part.walk.need)
        forward += ahead * part.count
        backward += back * part.count
        if part.checkpointed:
            early = not case.recompute.reentrant
            again += recompute_flops(part.region, part.walk.need, stop_early=early) * part.count
    return Flops(forward=forward, backward=backward, recompute=again, optimizer=0, total=forward + backward + again)


def _on_device(case: Case, memory: Memory, gpu: Gpu | None) -> tuple[Memory, tuple[Assumption, ...]]:
    """The memory section with what must fit on the card; null on the cpu backend."""
    if case.job.backend == "cpu":
        return memory, (Assumption(what="memory.device_bytes", value=None, why="the cpu backend uses no device"),)
    found = on_device(peak_bytes=memory.peak_bytes, reserved_bytes=memory.reserved_bytes, gpu=gpu)
    return memory.model_copy(update={"device_bytes": found.bytes}), found.notes
