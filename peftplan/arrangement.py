"""How a job's GPUs are used, and in which dtypes its weights are held and gathered."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from peftplan.arch.core import Arch
from peftplan.errors import Unsupported
from peftplan.formats import Format
from peftplan.graph.blocks.setup import Setup
from peftplan.job import Job
from peftplan.layouts import SINGLE, Layout, Pipeline, check, knobs_of, layout_of, stated_world, unmodelled
from peftplan.layouts.styles import style_of
from peftplan.layouts.units import Style
from peftplan.methods import Host
from peftplan.notes import Notes
from peftplan.plugins import configure
from peftplan.units import DType


class HeldAs(NamedTuple):
    """A setup and a host as they are for weights between steps."""

    setup: Setup
    host: Host


def gathered_as(held: HeldAs, dtype: DType, fmt: Format, *, new: bool) -> HeldAs:
    """The same with every weight that is not packed in the dtype that operations read it in; a method's own too where
    `new`, or else as it is held."""
    types = replace(held.setup.types, norm=dtype, embedding=dtype, head=dtype, bias=dtype)
    if not fmt.packed:
        types = replace(types, linear=dtype)
    setup = replace(held.setup, types=types)
    own = dtype if new else held.host.new_dtype
    return HeldAs(setup, replace(held.host, adapter_dtype=own, base_dtype=dtype))


def arranged(job: Job, arch: Arch, seq_len: int, notes: Notes) -> tuple[int, Layout, Style | None]:
    """(GPUs of a node, how they are used, how replicas share weights).

    One GPU is what nobody asked for: a layout of more then says how many.
    """
    gpus = job.gpus
    if job.gpus * job.nodes == 1:
        if job.layout is None and not job.knobs("layout"):
            return 1, SINGLE, None
        gpus = stated_world(job.layout)
        if gpus > 1:
            notes.add("gpus", gpus, f"as many as --layout {job.layout} takes, in one node; give --gpus and --nodes")
    elif job.layout is None:
        notes.add("layout", "ddp", "torchrun's default for several GPUs: a replica on each")
    own, knobs = knobs_of(job.knobs("layout"))
    layout = layout_of(job.layout, gpus=gpus, nodes=job.nodes, settings=configure(Pipeline, own, what="layout"))
    check(layout, arch, job.grad_accum, seq_len)
    if layout.pp > job.grad_accum:
        why = (
            "micro-batches a step: fewer than stages leave GPUs idle, and torch's 1F1B refuses them; raise --grad-accum"
        )
        notes.add("grad_accum", job.grad_accum, why)
    missing = unmodelled(layout)
    if missing is not None:
        raise Unsupported(f"--layout {job.layout or layout.style}: {missing} is not modelled yet; use --gpus 1")
    style = None if layout.framework == "megatron" else style_of(layout.style, knobs)
    return gpus, layout, style if layout.dp > 1 else None
