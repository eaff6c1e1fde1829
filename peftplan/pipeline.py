"""The whole pipeline on one screen: Job -> graph of one step -> memory, FLOPs, fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftplan.assemble import (
    Trainees,
    as_run,
    build_graph,
    host_state_bytes,
    step_bytes,
    trainees,
    whole_graph,
)
from peftplan.cost import price
from peftplan.errors import RequestError
from peftplan.fit import fit_reasons, judge_fit
from peftplan.graph.core import Graph
from peftplan.hardware import Gpu, find_gpu
from peftplan.hardware.gpus import usable_bytes
from peftplan.hardware.overheads import cuda_context, nccl_communicator
from peftplan.job import Assumption, Job, make_job
from peftplan.layouts import within
from peftplan.layouts.stages import stages
from peftplan.pace import Others, pace
from peftplan.reserve import usage
from peftplan.resolve import Case, resolve
from peftplan.result import (
    Estimate,
    Flops,
    Held,
    Late,
    Memory,
    Parameters,
    RankMemory,
)
from peftplan.spread import BEFORE, Spread, spread
from peftplan.staged import Chunk, bubble, labels, rank_step
from peftplan.standing import existing_bytes, gradient_bytes, static_bytes
from peftplan.step.clock import cache_bytes
from peftplan.step.memory import PhasePeak, StepMemory, run_step
from peftplan.step.segments import segments
from peftplan.step.walk import Rules
from peftplan.step.walk import exact as exact_size
from peftplan.step.work import Pass, passes

VERSION = "0.1.0"


@dataclass(frozen=True, kw_only=True)
class Walked:
    """One step of a case on one GPU, before any clock, price or verdict."""

    case: Case
    graph: Graph
    """Of the rank that holds most."""
    whole: Graph
    """Of the model, all ranks' shares together."""
    trainees: Trainees
    rules: Rules
    static: dict[str, int]
    """What lives between steps, by kind."""
    step: StepMemory
    existing_grad_bytes: int
    spread: Spread | None = None
    """What its layout makes of its weights, where replicas share them."""
    ranks: tuple[RankMemory, ...] = ()
    """Every distinct rank, where they differ."""
    replayed: Graph | None = None
    """What the allocator's replay runs, where that is not the whole `graph`."""
    beside: tuple[int, ...] = ()
    """Bytes of tensors that live through it without having a part in it."""

    def resident_bytes(self) -> list[int]:
        """Of each tensor that stays between steps, but for states and gradients, which are one each."""
        params = [self.rules.size(t.nbytes) for t, count in self.graph.params() for _ in range(count)]
        return [size for size in (*params, self.static["state"], self.existing_grad_bytes) if size]


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
    turns = case.method.stages(case.arch)
    if turns == (case.method,):
        return _walk(case)
    walked = [_walk(replace(case, method=stage)) for stage in turns]
    worst = max(walked, key=lambda one: one.step.peak.bytes)
    lowest = min(walked, key=lambda one: one.step.peak.bytes)
    why = f"what trains changes; this is when the peak is highest, the lowest of {len(turns)} stages looked at is"
    note = Assumption(
        what="stage",
        value=worst.case.method.stage,
        why=f"{why} {lowest.step.peak.bytes:,} bytes, with {lowest.case.method.stage}" if len(turns) > 1
        else "the only one it has, or sure to be the one with the highest peak",
    )  # fmt: skip
    return replace(worst, case=replace(worst.case, assumptions=(*case.assumptions, note)))


def _walk(case: Case) -> Walked:
    graph = build_graph(case)
    walked = _walk_graph(case, graph) if case.layout.pp == 1 else _walk_pipeline(case, graph)
    return walked if case.layout.mesh.alone else replace(walked, whole=whole_graph(case, graph))


def _walk_graph(case: Case, graph: Graph, *, entry_requires_grad: bool | None = None) -> Walked:
    """One step over a graph that one rank holds."""
    rules = _rules(case)
    rank = spread(case, graph)
    train = rank.trainees if rank is not None else trainees(case, graph)
    static = static_bytes(case, graph, train, rules, rank)
    before = rank.gradients_before(case.loop) if rank is not None else BEFORE[case.loop.grads_exist]
    existing = existing_bytes(case, graph, train, rules, (rank, before))
    step = run_step(
        as_run(case, graph),
        static_bytes=sum(static.values()),
        recompute=case.recompute,
        rules=rules,
        loop=replace(case.loop, grads_exist=before == "whole") if rank is not None else case.loop,
        existing_grad_bytes=existing,
        entry_requires_grad=case.recompute.layers if entry_requires_grad is None else entry_requires_grad,
        sharding=rank.sharding(before) if rank is not None else None,
    )
    if case.format.cuts and case.method.backward:
        _check_reached(case, step)
    _optimizer_phase(case, step, train, rules)
    _between(case, step, graph, rules)
    return Walked(
        case=case,
        graph=graph,
        whole=graph,
        trainees=train,
        rules=rules,
        static=static,
        step=step,
        existing_grad_bytes=existing,
        spread=rank,
    )


def _walk_pipeline(case: Case, graph: Graph) -> Walked:
    """Every distinct stage once; the answer is that of the rank with the highest peak."""
    layout = case.layout
    cuts = stages(graph, layout)
    trains = [any(t.trainable for t, _ in cut.params()) for cut in cuts]
    chunks: dict[tuple[int, bool], tuple[Walked, Chunk]] = {}
    ranks: list[Walked] = []
    for rank in range(layout.pp):
        mine = []
        for stage in range(rank, len(cuts), layout.pp):
            key = id(cuts[stage]), any(trains[:stage]) or case.recompute.layers
            if key not in chunks:
                chunks[key] = _chunk(case, cuts[stage], entry_requires_grad=key[1])
            mine.append(chunks[key])
        ranks.append(_rank(case, graph, rank, mine))
    fullest = max(ranks, key=lambda one: one.step.peak.bytes)
    return replace(
        fullest, ranks=tuple(_rank_memory(one, label) for one, label in zip(ranks, labels(layout), strict=True))
    )


def _chunk(case: Case, cut: Graph, *, entry_requires_grad: bool) -> tuple[Walked, Chunk]:
    """A stage's first micro-batch and a later one. The output of the last stage is a name that the next rebinds; that
    of others is held anyway."""
    until = "next" if cut.regions[-1].is_head else "loss"
    case = replace(case, loop=replace(case.loop, outputs_until=until))
    later = first = _walk_graph(case, cut, entry_requires_grad=entry_requires_grad)
    if case.loop.grads_exist:
        fresh = replace(case, loop=replace(case.loop, grads_exist=False))
        first = _walk_graph(fresh, cut, entry_requires_grad=entry_requires_grad)
    grads = gradient_bytes(case, cut, later.trainees.weights, later.rules)
    inputs = sum(later.rules.size(t.nbytes) for t in cut.inputs)
    return later, Chunk(first=first.step, later=later.step, grad_bytes=grads, input_bytes=inputs, rules=later.rules)


def _rank(case: Case, graph: Graph, rank: int, chunks: Sequence[tuple[Walked, Chunk]]) -> Walked:
    """A rank of a pipeline with all its chunks."""
    each = [walked for walked, _ in chunks]
    kinds = dict.fromkeys(kind for walked in each for kind in walked.static)
    static = {kind: sum(walked.static.get(kind, 0) for walked in each) for kind in kinds}
    if "workspace" in static:
        static["workspace"] = max(walked.static["workspace"] for walked in each)
    held = sum(static.values())
    steps = [chunk for _, chunk in chunks]
    found = rank_step(case.layout, rank, steps, case.job.grad_accum, held)
    step, busy = found.step, each[found.moment.chunk]
    static["communication"] = found.buffer_bytes
    others = [size for walked in each if walked is not busy for size in walked.resident_bytes()]
    regions = tuple(region for walked in each for region in walked.graph.regions)
    mine = replace(graph, regions=regions) if len(each) > 1 else each[0].graph
    train, rules = trainees(case, mine), each[0].rules
    _optimizer_phase(case, step, train, rules)
    existing = sum(walked.existing_grad_bytes for walked in each)
    return Walked(
        case=case,
        graph=mine,
        whole=graph,
        trainees=train,
        rules=rules,
        static=static,
        step=step,
        existing_grad_bytes=existing,
        replayed=busy.graph,
        beside=(*others, *found.beside(case.layout, steps), static.get("bucket", 0)),
    )


def _rank_memory(walked: Walked, label: str) -> RankMemory:
    static = walked.step.static_bytes + walked.existing_grad_bytes
    return RankMemory(
        rank=label, peak_bytes=walked.step.peak.bytes, reserved_bytes=None, device_bytes=None, static_bytes=static
    )


def _check_reached(case: Case, step: StepMemory) -> None:
    """Raises RequestError where torch does: the loss requires no gradient, as layers that lead to it hand none on."""
    last = step.segments[-1]
    if last.region.is_head and last.region.exit.name not in last.walk.need:
        raise RequestError(
            f"--format {case.job.format}: its layers hand no gradient on, so none reaches what trains; adapt the last "
            "ones too (--target-modules o_proj,down_proj), or quantize weights alone"
        )


def read(job: Job) -> Reading:
    """The estimate of a job with its workings."""
    walked = walk(resolve(job))
    case, graph, static, step = walked.case, walked.graph, walked.static, walked.step
    gpu = find_gpu(case.job.gpu) if case.job.gpu is not None else None
    memory, device_notes = _on_device(walked, _memory(walked), gpu)
    runs = passes(
        step.segments, cache_bytes=cache_bytes(gpu) if gpu is not None else None, forwards=case.method.forwards
    )
    flops = _flops(runs if walked.whole is graph else _whole_passes(case, walked))
    paced = pace(case, runs, flops, gpu, trained=walked.trainees.weights, state_bytes=static["state"],
                 others=among(walked))  # fmt: skip
    priced = price(case.job, paced.time, gpu)
    answer = Estimate(
        version=VERSION,
        job=case.job,
        parameters=_parameters(walked.whole),
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


def _whole_passes(case: Case, walked: Walked) -> list[Pass]:
    """What one micro-batch of one replica runs, all ranks together."""
    graph = as_run(case, walked.whole)
    parts = segments(graph, case.recompute, walked.rules, case.loop, entry_requires_grad=case.recompute.layers)
    return passes(parts, forwards=case.method.forwards)


def among(walked: Walked) -> Others:
    """What other GPUs are to the time of a step."""
    case, spread = walked.case, walked.spread
    messages = spread.messages(micro_batches=case.job.grad_accum) if spread is not None else ()
    times, again = case.job.grad_accum, case.recompute.layers
    inside = within.messages(walked.graph, case.layout, micro_batches=times, again=again)
    return Others(stretch=bubble(case.layout, times), messages=(*messages, *inside))


def _rules(case: Case) -> Rules:
    if case.job.backend == "cpu":
        return Rules(size=exact_size)
    return Rules()


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


def _memory(walked: Walked) -> Memory:
    case, static, step = walked.case, walked.static, walked.step
    peak = step.peak
    kinds = {**static, "gradient": peak.grad_bytes, "activation": peak.saved_bytes}
    kinds["temporary"] = peak.bytes - sum(kinds.values())
    return Memory(
        peak_bytes=peak.bytes,
        static_bytes=step.static_bytes + walked.existing_grad_bytes,
        saved_for_backward_bytes=step.saved_for_backward_bytes,
        at_peak={k: v for k, v in kinds.items() if v},
        at_peak_phase=peak.phase,
        phases={
            "load": sum(size for kind, size in static.items() if kind in ("weight", "adapter", "buffer")),
            **{name: p.bytes for name, p in step.phases.items()},
        },
        per_rank=walked.ranks,
        host_bytes=step.host_bytes + host_state_bytes(case.optimizer, walked.trainees, case.job.backend),
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
    case = walked.case
    if not _has_device(case, gpu):
        why = "the cpu backend uses no device"
        if gpu is not None and case.job.backend == "cuda":
            why = f"how {gpu.vendor} devices hold memory is not modelled; the bytes of tensors are"
        return memory, (Assumption(what="memory.device_bytes", value=None, why=why),)
    context = cuda_context(gpu.capability if gpu is not None else None)
    groups = [case.layout.shards, case.layout.replicates] if case.layout.shards > 1 else [case.layout.dp]
    nccl = [nccl_communicator(ranks) for ranks in groups if ranks > 1]
    beside = context.bytes + sum(figure.bytes for figure in nccl)

    def held() -> Held:
        card = usable_bytes(gpu).bytes if gpu is not None else None
        limit = card - beside if card is not None else None
        graph, workspaces = walked.replayed or walked.graph, walked.static.get("workspace", 0)
        found = usage(case, graph, workspaces, capacity_bytes=limit, beside=walked.beside, rank=walked.spread)
        reserved = found.peak_reserved_bytes
        return Held(reserved, reserved + beside)

    notes = [Assumption(what="allocator", value="CUDA", why="ROCm's allocator and context are taken for CUDA's")]
    if gpu is None or gpu.vendor == "NVIDIA":
        notes.clear()
    note = Assumption(what="context_bytes", value=context.bytes, why=f"{context.standing}; errs {context.errs}")
    notes += [Assumption(what="nccl_bytes", value=f.bytes, why=f"{f.standing}; errs {f.errs}") for f in nccl]
    return memory.holding(Late(held)), (note, *notes)
