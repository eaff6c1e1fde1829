"""The time section of the answer: seconds of a step, tokens per second, model FLOPs utilisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftplan.graph.blocks.setup import Batch
from peftplan.hardware.gpus import Gpu
from peftplan.job import Assumption
from peftplan.layouts.units import Message
from peftplan.optimizers.base import Optimizer, Trained
from peftplan.resolve import Case
from peftplan.result import Communication, Flops, Interval, Time
from peftplan.step.clock import (
    ACCURACY,
    OF_PEAK,
    Meter,
    OptimizerTraffic,
    StepTime,
    Unknown,
    attention_kernel,
    is_measured,
    metered,
    peak_flops,
)
from peftplan.step.wire import Sent, exposed_seconds, sent
from peftplan.step.work import Pass
from peftplan.units import DType


@dataclass(frozen=True, kw_only=True, slots=True)
class Paced:
    """A Time and the reasons for what it leaves open or guesses."""

    time: Time
    notes: tuple[Assumption, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Others:
    """What other GPUs are to the step: `stretch` is how much longer it is than one GPU's own work, for the waits of a
    pipeline; `messages` are what data parallelism sends."""

    stretch: float = 1.0
    messages: Sequence[Message] = ()


ALONE = Others()


def pace(
    case: Case,
    runs: Sequence[Pass],
    flops: Flops,
    gpu: Gpu | None,
    *,
    trained: Sequence[Trained],
    state_bytes: int,
    others: Others = ALONE,
) -> Paced:
    """Time of one optimizer step (`grad_accum` micro-batches and the optimizer), `runs` being what one GPU runs of it.

    `tokens_per_second` counts padded tokens of all replicas. `mfu` is the forward and backward FLOPs that the method
    needs, without recomputation, attention over the whole S × S matrix, over the dense peak of the compute dtype.
    In `breakdown`, `compute` holds the matrix products and the waits for the host's launches, `memory` all
    other traffic on the device, `offload` copies to the host and back, `exposed` waits for other GPUs; they sum to the
    expected time. `communication` is how long the links work, most of it behind the rest.
    """
    if gpu is None:
        return _open("no GPU named; give --gpu")
    meter = metered_case(case, runs, gpu)
    if isinstance(meter, Unknown):
        return _open(meter.why)
    found = meter.total(traffic(case.optimizer, trained, state_bytes), case.job.grad_accum)
    return pace_of(case, found, flops, gpu, others)


def pace_of(case: Case, found: StepTime, flops: Flops, gpu: Gpu, others: Others) -> Paced:
    """The same of a GPU's own work, `found`."""
    wires = sent(others.messages, gpu, case.layout, gpus_per_node=case.job.gpus)
    if wires is None:
        return _open(f"the bandwidth between {gpu.name} cards is unknown")
    return _paced(case, found, flops, gpu, (others.stretch, wires))


def metered_case(case: Case, runs: Sequence[Pass], gpu: Gpu) -> Meter | Unknown:
    """The seconds of one micro-batch of `case` on `gpu`, whatever the optimizer; `runs` for its `cache_bytes`."""
    if case.job.backend == "cpu":
        return Unknown(why="the clock models GPUs, not the cpu backend")
    kernel = attention_kernel(case.setup.attention, masked=case.setup.batch.masked, gpu=gpu, compute=_computed_in(case))
    return metered(runs, gpu, attention=kernel)


def tokens_per_second(batch: Batch, found: StepTime, *, micro_batches: int) -> float:
    """Padded tokens of `micro_batches` over the expected time of the step that they make."""
    return micro_batches * batch.size * batch.seq / found.expected


def _computed_in(case: Case) -> DType:
    return case.setup.numerics.autocast or case.compute


def _open(why: str) -> Paced:
    time = Time(step_seconds=None, tokens_per_second=None, mfu=None, breakdown=None)
    return Paced(time=time, notes=(Assumption(what="time", value=None, why=why),))


def traffic(optimizer: Optimizer, trained: Sequence[Trained], state_bytes: int) -> OptimizerTraffic:
    """What the optimizer's step moves on a GPU.

    One that makes no temporaries is one kernel; the others pass over memory again and again.
    """
    return OptimizerTraffic(
        weight_bytes=sum(w.bytes * w.copies for w in trained),
        state_bytes=state_bytes,
        fused=optimizer.step_bytes(trained, "cuda") == 0,
    )


def _paced(case: Case, found: StepTime, flops: Flops, gpu: Gpu, others: tuple[float, Sequence[Sent]]) -> Paced:
    stretch, wires = others
    times, compute, layout = case.job.grad_accum, _computed_in(case), case.layout
    peak = peak_flops(gpu, compute)
    useful = times * (flops.forward + flops.backward) * layout.dp / layout.world
    overlaps = case.style.overlaps if case.style is not None else 0.0
    waiting = exposed_seconds(wires, computing=found.expected, overlaps=overlaps) if wires else 0.0
    expected = stretch * found.expected + waiting
    tokens = times * case.setup.batch.size * case.setup.batch.seq
    time = Time(
        step_seconds=Interval(low=found.low, expected=expected, high=stretch * found.high + 2 * waiting),
        tokens_per_second=tokens * layout.dp / expected,
        mfu=useful / expected / peak if peak is not None else None,
        breakdown={
            "compute": found.compute + found.launching,
            "memory": found.memory,
            "communication": sum(one.seconds for one in wires),
            "offload": found.offload,
            "exposed": expected - found.expected,
        },
        communication=tuple(_communication(one) for one in wires),
    )
    return Paced(time=time, notes=tuple(_notes(gpu, compute)))


def _communication(one: Sent) -> Communication:
    return Communication(
        collective=one.collective,
        link=one.link,
        ranks=one.ranks,
        calls=one.calls,
        sent_bytes=one.bytes,
        link_seconds=one.seconds,
    )


def _notes(gpu: Gpu, compute: DType) -> list[Assumption]:
    notes = [Assumption(what="time.step_seconds", value="roofline", why=ACCURACY)]
    if not is_measured(gpu):
        why = f"of dense peak: no matrix product was measured on {gpu.name}; errs either way by half"
        notes.append(Assumption(what="time.achieved_fraction", value=OF_PEAK, why=why))
    if peak_flops(gpu, compute) is None:
        why = f"the peak of {gpu.name} in {compute.label} is unknown"
        notes.append(Assumption(what="time.mfu", value=None, why=why))
    return notes
