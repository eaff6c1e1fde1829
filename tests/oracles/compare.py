"""An estimate and a trace of one job, number by number."""

from __future__ import annotations

from typing import Any

from peftplan.instruments.answer import Trace
from peftplan.job import Job
from peftplan.pipeline import estimate
from peftplan.result import Estimate

PEAK_TOLERANCE = 0.01
"""The order in which autograd frees inside one node, and host scalars, are not modelled to the last byte."""


def traced(job: Job) -> Trace:
    """The trace of `job` on one thread: tiny tensors gain nothing from more."""
    import torch

    from peftplan.instruments.trace import trace

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return trace(job)
    finally:
        torch.set_num_threads(before)


def assert_equal(job: Job, *, exact_peak: bool = False) -> None:
    """Everything that can be counted is equal, the peak at least within PEAK_TOLERANCE."""
    found, real = estimate(job), traced(job)
    assert counted(found) == counted_in(real)
    allowed = 0 if exact_peak else PEAK_TOLERANCE * real.peak_bytes
    off = found.memory.peak_bytes - real.peak_bytes
    assert abs(off) <= allowed, f"peak {found.memory.peak_bytes} is {off:+d}; {found.memory.phases} {real.phases}"


def counted(found: Estimate) -> dict[str, Any]:
    """What of an estimate must be equal."""
    flops = found.flops
    return {
        **found.parameters.model_dump(),
        "saved_for_backward_bytes": found.memory.saved_for_backward_bytes,
        "flops": {"forward": flops.forward, "backward": flops.backward, "recompute": flops.recompute},
    }


def counted_in(real: Trace) -> dict[str, Any]:
    """The same of a trace."""
    return {
        **real.parameters,
        "saved_for_backward_bytes": real.saved_for_backward_bytes,
        "flops": {name: real.flops[name] for name in ("forward", "backward", "recompute")},
    }
