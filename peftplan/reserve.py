"""Reserved bytes of one job: its step replayed through the caching allocator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftplan.graph.blocks.decoder import module_order
from peftplan.graph.core import ADAPTER, Graph, Tensor, is_global
from peftplan.hardware.overheads import HANDLES, cublas_workspace, cublaslt_workspace
from peftplan.job import Job
from peftplan.pipeline import Reading, build_graph, read, trained
from peftplan.result import Estimate
from peftplan.step.allocator import Usage
from peftplan.step.replay import Around, replay


def usage(reading: Reading) -> Usage:
    """What torch.cuda.memory_stats would say of a steady step: 30 to 100 ms for 24 to 32 layers (2026-11).

    The step before has the same size, unless `allocator.seq_len_before` says that it was shorter.
    `allocator.empty_cache=true` empties the cache before each step.
    """
    case = reading.case
    return replay(
        _steps(reading),
        _around(reading),
        recompute=case.recompute,
        loop=case.loop,
        entry_requires_grad=case.recompute.layers,
        empty_cache=bool(case.job.knobs("allocator").get("empty_cache", False)),
    )


def estimate_with_reserved(job: Job) -> Estimate:
    """The estimate with `memory.reserved_bytes` replayed."""
    reading = read(job)
    reserved = usage(reading).peak_reserved_bytes
    memory = reading.estimate.memory
    context = 0 if memory.device_bytes is None else memory.device_bytes - memory.peak_bytes
    changed = memory.model_copy(update={"reserved_bytes": reserved, "device_bytes": reserved + context})
    return reading.estimate.model_copy(update={"memory": changed})


def _steps(reading: Reading) -> list[Graph]:
    graph, before = reading.graph, reading.case.job.knobs("allocator").get("seq_len_before")
    if before is None:
        return [graph, graph]
    setup = reading.case.setup
    shorter = replace(setup, batch=replace(setup.batch, seq=int(before)))
    return [graph, build_graph(replace(reading.case, setup=shorter)), graph]


def _around(reading: Reading) -> Around:
    case, graph = reading.case, reading.graph
    weights = trained(graph)
    each = [w.bytes for w in weights for _ in range(w.copies)]
    states = [s.bytes for s in case.optimizer.states(weights, "cuda") for _ in range(s.copies) if not s.host]
    step = case.optimizer.step_bytes(weights, "cuda")
    product = cublas_workspace(case.setup.numerics.capability).bytes
    biased = (reading.static.get("workspace", 0) - HANDLES * product) // cublaslt_workspace().bytes
    return Around(
        weights=[t.nbytes for t in _loaded(graph)],
        states=states,
        workspaces=[product] * HANDLES + [cublaslt_workspace().bytes] * biased,
        step_temporaries=each if step == sum(each) else [step],
    )


def _loaded(graph: Graph) -> Iterator[Tensor]:
    """Every weight in the order of loading: the base layer by layer, then the adapters."""
    seen: set[str] = set()
    for adapters in (False, True):
        for region in graph.regions:
            mine = [t for t in region.params() if (t.kind == ADAPTER) is adapters and t.name not in seen]
            seen.update(t.name for t in mine if is_global(t.name))
            for _ in range(region.count):
                yield from sorted(mine, key=lambda t: module_order(t.name))
    yield from graph.unused
