"""Reserved bytes of one job: its step replayed through the caching allocator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peftplan.assemble import as_run, build_graph, step_bytes, trainees
from peftplan.errors import RequestError
from peftplan.graph.blocks.setup import Batch
from peftplan.graph.core import Graph
from peftplan.hardware import find_gpu
from peftplan.hardware.gpus import usable_bytes
from peftplan.hardware.overheads import HANDLES, cublas_workspace, cublaslt_workspace
from peftplan.loading import loading
from peftplan.process import AllocatorKnobs, allocator_knobs
from peftplan.resolve import Case
from peftplan.spread import Spread
from peftplan.step.allocator import AllocatorSettings, Usage
from peftplan.step.replay import Around, replay
from peftplan.step.walk import exact
from peftplan.training_loop import average_sizes
from peftplan.units import MIB


def usage(
    case: Case,
    graph: Graph,
    workspace_bytes: int,
    *,
    capacity_bytes: int | None = None,
    beside: Sequence[int] = (),
    rank: Spread | None = None,
) -> Usage:
    """What torch.cuda.memory_stats would say of a steady step: 30 to 100 ms for 24 to 32 layers (2026-11).

    The step before has the same size, unless `allocator.seq_len_before` says that it was shorter.
    `allocator.empty_cache=true` empties the cache before each step; settings of PYTORCH_CUDA_ALLOC_CONF are those of
    `allocator.*`. Cached memory is given back where more than `capacity_bytes` would be held.
    """
    knobs = allocator_knobs(case.job)
    before = rank.gradients_before(case.loop) if rank is not None else None
    return replay(
        [as_run(case, each) for each in _steps(case, graph)],
        replace(around(case, graph, workspace_bytes, rank), beside=beside),
        recompute=case.recompute,
        loop=case.loop if before is None else replace(case.loop, grads_exist=before == "whole"),
        entry_requires_grad=case.recompute.layers,
        settings=_settings(case, knobs, capacity_bytes),
        empty_cache=knobs.empty_cache or case.method.empties_cache,
        sharding=rank.sharding(before) if rank is not None and before is not None else None,
    )


def _settings(case: Case, knobs: AllocatorKnobs, capacity_bytes: int | None) -> AllocatorSettings:
    allowed = _allowed(case, knobs)
    threshold, split = knobs.garbage_collection_threshold, knobs.max_split_size_mb
    return AllocatorSettings(
        expandable_segments=knobs.expandable_segments,
        max_split_bytes=None if split is None else split * MIB,
        capacity_bytes=min((b for b in (capacity_bytes, allowed) if b is not None), default=None),
        roundup_power2_divisions=knobs.roundup_power2_divisions,
        collects_from_bytes=None if threshold is None or allowed is None else int(threshold * allowed),
    )


def _allowed(case: Case, knobs: AllocatorKnobs) -> int | None:
    """What `allocator.memory_fraction` leaves of the card. Raises RequestError where no card is named."""
    if knobs.memory_fraction is None:
        return None
    total = usable_bytes(find_gpu(case.job.gpu)).bytes if case.job.gpu is not None else None
    if total is None:
        raise RequestError("allocator.memory_fraction: name a card of known memory with --gpu")
    return int(knobs.memory_fraction * total)


def _steps(case: Case, graph: Graph) -> list[Graph]:
    before = allocator_knobs(case.job).seq_len_before
    if before is None:
        return [graph, graph]
    batch = Batch.of(case.job.batching or "exact", size=case.job.micro_batch, seq=before)
    shorter = replace(case.setup, batch=case.method.seen(batch))
    return [graph, build_graph(replace(case, setup=shorter)), graph]


def around(case: Case, graph: Graph, workspace_bytes: int, rank: Spread | None = None) -> Around:
    """What lives beyond a step: the loaded model, optimizer states, workspaces."""
    train = trainees(case, graph) if rank is None else rank.trainees
    each = [w.bytes for w in train.weights for _ in range(w.copies)]
    copies = [w.bytes for w in train.copied for _ in range(w.copies)]
    states = [s.bytes for s in case.optimizer.states(train.remembered, "cuda") for _ in range(s.copies) if not s.host]
    states += [*average_sizes(case.loop, graph, train.weights), *case.recompute.buffers(graph)]
    step = step_bytes(case.optimizer, train, exact, clips=case.loop.clips)
    product = cublas_workspace(case.setup.numerics.capability).bytes
    biased = (workspace_bytes - HANDLES * product) // cublaslt_workspace().bytes
    if rank is not None:
        before = rank.gradients_before(case.loop)
        own = [] if before == "none" else [*rank.gradients(before)]
    else:
        own = each if case.loop.grads_exist and not case.optimizer.holds_gradients else []
    return Around(
        load=loading(case, graph) if rank is None or not rank.style.shards_weights else rank.load(graph),
        buckets=rank.buffers if rank is not None else (),
        states=[*copies, *states],
        gradients=own,
        workspaces=[product] * HANDLES + [cublaslt_workspace().bytes] * biased,
        between=case.method.between(graph),
        step_temporaries=each if step == sum(each) else [step],
    )
