"""Reserved bytes of one job: its step replayed through the caching allocator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftplan.assemble import build_graph, trained
from peftplan.graph.blocks.decoder import Batch, module_order
from peftplan.graph.core import ADAPTER, Graph, Tensor, is_global
from peftplan.hardware.overheads import HANDLES, cublas_workspace, cublaslt_workspace
from peftplan.resolve import Case
from peftplan.step.allocator import Usage
from peftplan.step.replay import Around, replay


def usage(case: Case, graph: Graph, workspace_bytes: int) -> Usage:
    """What torch.cuda.memory_stats would say of a steady step: 30 to 100 ms for 24 to 32 layers (2026-11).

    The step before has the same size, unless `allocator.seq_len_before` says that it was shorter.
    `allocator.empty_cache=true` empties the cache before each step.
    """
    return replay(
        _steps(case, graph),
        _around(case, graph, workspace_bytes),
        recompute=case.recompute,
        loop=case.loop,
        entry_requires_grad=case.recompute.layers,
        empty_cache=bool(case.job.knobs("allocator").get("empty_cache", False)),
    )


def _steps(case: Case, graph: Graph) -> list[Graph]:
    before = case.job.knobs("allocator").get("seq_len_before")
    if before is None:
        return [graph, graph]
    batch = Batch.of(case.job.batching or "exact", size=case.job.micro_batch, seq=int(before))
    shorter = replace(case.setup, batch=case.method.seen(batch))
    return [graph, build_graph(replace(case, setup=shorter)), graph]


def _around(case: Case, graph: Graph, workspace_bytes: int) -> Around:
    weights = trained(graph)
    each = [w.bytes for w in weights for _ in range(w.copies)]
    states = [s.bytes for s in case.optimizer.states(weights, "cuda") for _ in range(s.copies) if not s.host]
    step = case.optimizer.step_bytes(weights, "cuda")
    product = cublas_workspace(case.setup.numerics.capability).bytes
    biased = (workspace_bytes - HANDLES * product) // cublaslt_workspace().bytes
    return Around(
        weights=[t.nbytes for t in _loaded(graph)],
        states=states,
        gradients=each if case.loop.grads_exist else [],
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
