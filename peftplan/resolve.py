"""From a Job as asked to a Job with every choice made, and the reasons for those that mattered.

Defaults are what transformers, PEFT and torch do when nobody tells them otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from peftplan import formats, kernels, methods
from peftplan import recompute as policies
from peftplan.arch import load_arch
from peftplan.arch.core import Arch
from peftplan.errors import RequestError, UnknownName, Unsupported
from peftplan.formats import Format
from peftplan.graph.blocks.loss import STYLES, LossStyle
from peftplan.graph.blocks.setup import Batch, Setup
from peftplan.graph.builder import Numerics
from peftplan.graph.core import Graph, Op, Region
from peftplan.hardware.find import find_gpu
from peftplan.job import Assumption, Batching, Job
from peftplan.layouts import SINGLE, Layout, Pipeline, check, knobs_of, layout_of, stated_world, unmodelled
from peftplan.layouts.styles import style_of
from peftplan.layouts.units import Style
from peftplan.methods import Host, Method
from peftplan.methods.targets import Names
from peftplan.notes import Notes
from peftplan.optimizers import Optimizer
from peftplan.plugins import canonical, configure
from peftplan.precision import float_dtype, precision_of, weight_types
from peftplan.process import allocator_knobs, load_knobs
from peftplan.recompute import Recompute
from peftplan.sharing import check_shared, looped, stepped
from peftplan.step.segments import Loop
from peftplan.training_loop import loop_of, optimizer_of, projection, usual_optimizer
from peftplan.units import DType

ATTENTION = {
    "eager": "eager",
    "sdpa": "sdpa",
    "sdpa_flash": "sdpa_flash",
    "sdpa_efficient": "sdpa_efficient",
    "sdpa_math": "sdpa_math",
    "flash_attention_2": "flash_attention_2",
    "fa2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
    "fa3": "flash_attention_3",
}
PREFIXES = (
    "method",
    "format",
    "optimizer",
    "layout",
    "model",
    "recompute",
    "loop",
    "loss",
    "allocator",
    "load",
    "kernels",
    "precision",
)


class HeldAs(NamedTuple):
    """A setup and a host as they are for weights between steps."""

    setup: Setup
    host: Host


@dataclass(frozen=True, kw_only=True)
class Case:
    """A resolved job and the objects its names stand for."""

    job: Job
    arch: Arch
    layout: Layout
    style: Style | None
    """How data-parallel ranks share weights; None where there is one replica."""
    held: HeldAs | None
    """What weights are between steps, where operations read them in another dtype."""
    upcasts: bool
    """Whether trainable half-precision weights are held in fp32, whatever that says."""
    setup: Setup
    host: Host
    method: Method
    format: Format
    compute: DType
    """What packed weights are computed in: autocast's dtype, or else the model's."""
    optimizer: Optimizer
    recompute: Recompute
    loop: Loop
    assumptions: tuple[Assumption, ...]


def resolve(job: Job) -> Case:
    """Every name looked up, every default decided. Raises RequestError for what is wrong or not modelled."""
    _check_settings(job)
    _check_unmodelled(job)
    allocator_knobs(job)
    load_knobs(job)
    notes = Notes()
    arch = load_arch(job.model, config=job.config, overrides=job.knobs("model"))
    for text in arch.notes:
        notes.add("model", job.model, text)
    method_name, implied_format, format_knobs = _method_name(job)
    method = methods.make(method_name, _method_knobs(job))
    dtype, autocast, precision = precision_of(job, arch, notes, method)
    format_name = notes.default(job.format, "format", implied_format or dtype.label, _format_reason(implied_format))
    fmt = formats.make(format_name, {**format_knobs, **job.knobs("format")})
    if fmt.untrainable:
        raise RequestError(f"--format {format_name}: {fmt.untrainable}")
    if fmt.note:
        notes.add("format", format_name, fmt.note)
    dtype = fmt.dtype() or dtype
    optimizer = optimizer_of(job)
    optimizer_name = notes.default(job.optimizer, "optimizer", *usual_optimizer(job))
    rank, targets = _adapter_shape(job, arch, method, notes)
    if projection(job) is not None:
        rank, targets = optimizer.knob("rank"), optimizer.knob("optim_target_modules")
    seq_len, batching = _batch(job, arch, notes)
    gpus, layout, style = _layout(job, arch, seq_len, notes)
    optimizer = stepped(optimizer, layout, notes, tied=arch.tied)
    recompute_name, recompute = _recompute(job, method_name, method, fmt, notes)
    capability = find_gpu(job.gpu).capability if job.gpu is not None else None
    numerics = Numerics(autocast=autocast, backend=job.backend, capability=capability, float8=precision == "fp8")
    gathered = style.gathers_in(autocast) if style is not None else None
    if style is not None and not style.autocasts:
        gathered, autocast = gathered or (dtype if dtype.is_half else None), None
    compute = autocast or gathered or dtype
    setup = Setup(
        batch=method.seen(Batch.of(batching, size=job.micro_batch, seq=seq_len)),
        types=replace(weight_types(dtype, compute, fmt), opaque=fmt.opaque(numerics)),
        numerics=numerics,
        attention=_attention(job, notes),
        use_cache=_use_cache(job, arch, method, recompute, notes),
        loss=_loss(job),
        modeling=method.modeling(arch.family),
        mesh=layout.mesh,
        kernels=_kernels(job, arch, method, method_name, fmt, autocast),
    )
    check_shared(layout, arch, setup, fmt, method)
    host = Host(
        arch=arch,
        numerics=numerics,
        adapter_dtype=_adapter_dtype(job),
        base_dtype=dtype,
        packs=partial(_packs, fmt, compute, numerics),
        recomputes=recompute.layers,
        mesh=layout.mesh,
    )
    _note_new_dtype(host, method, notes)
    held = HeldAs(replace(setup, attention="sdpa"), host)  # of which only the weights are looked at
    if style is not None and gathered is not None:
        setup, host = _gathered(HeldAs(setup, host), gathered, fmt, new=style.gathers_new)
    decided = {
        "config": arch.model_dump() if job.config is None else job.config,
        "rank": rank,
        "target_modules": targets,
        "format": format_name,
        "dtype": dtype.label,
        "precision": precision,
        "optimizer": optimizer_name,
        "seq_len": seq_len,
        "batching": batching,
        "recompute": recompute_name,
        "attention": job.attention or "sdpa",
        "gpus": gpus,
        "layout": job.layout or ("none" if layout.alone else layout.style),
        "offload": job.offload or "none",
        "kernels": kernels.canonical(job.kernels or "hf"),
    }
    return Case(
        job=job.model_copy(update=decided),
        arch=arch,
        layout=layout,
        style=style,
        held=held if style is not None and style.autocasts and gathered is not None else None,
        upcasts=style is not None and style.upcasts(mixed=autocast is not None, packed=fmt.packed),
        setup=setup,
        host=host,
        method=method,
        format=fmt,
        compute=compute,
        optimizer=optimizer,
        recompute=recompute,
        loop=looped(loop_of(job, optimizer, method), layout),
        assumptions=(*job.remarks, *notes.items),
    )


def _batch(job: Job, arch: Arch, notes: Notes) -> tuple[int, Batching]:
    """(sequence length, batching)."""
    default_length = min(1024, arch.max_positions or 1024)
    seq_len: int = notes.default(job.seq_len, "seq_len", default_length, "TRL's default max_length, within the model's")
    _check_length(seq_len, arch, notes)
    several = job.micro_batch > 1
    why = "several sequences of different lengths are padded" if several else "one sequence needs no padding"
    batching: Batching = notes.default(job.batching, "batching", "padded" if several else "exact", why)
    return seq_len, batching


def held_case(case: Case) -> Case:
    """The case with weights as they are between steps."""
    if case.held is None:
        return case
    return replace(case, setup=case.held.setup, host=case.held.host, held=None)


def _gathered(held: HeldAs, dtype: DType, fmt: Format, *, new: bool) -> HeldAs:
    """The same with every weight that is not packed in the dtype that operations read it in; a method's own too where
    `new`, or else as it is held."""
    types = replace(held.setup.types, norm=dtype, embedding=dtype, head=dtype, bias=dtype)
    if not fmt.packed:
        types = replace(types, linear=dtype)
    setup = replace(held.setup, types=types)
    own = dtype if new else held.host.new_dtype
    return HeldAs(setup, replace(held.host, adapter_dtype=own, base_dtype=dtype))


def _layout(job: Job, arch: Arch, seq_len: int, notes: Notes) -> tuple[int, Layout, Style | None]:
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


def _attention(job: Job, notes: Notes) -> str:
    """The canonical name of the attention implementation."""
    asked = notes.default(job.attention, "attention", "sdpa", "transformers' default")
    found = ATTENTION.get(canonical(asked))
    if found is None:
        raise UnknownName("attention implementation", asked, ATTENTION)
    return found


def _kernels(
    job: Job, arch: Arch, method: Method, method_name: str, fmt: Format, autocast: DType | None
) -> kernels.Kernels:
    """Whose kernels run, if they run on this."""
    made = kernels.make(job.kernels or "hf", job.knobs("kernels"))
    if made.owns_loss and "loss.style" in job.settings:
        raise RequestError(
            f"loss.style={job.settings['loss.style']}: the loss is that of --kernels {job.kernels}; leave it out"
        )
    knobs = {name: method.knob(name) for name in method.__dataclass_fields__}
    made.check(
        kernels.Asked(
            arch=arch,
            method=methods.resolve_name(method_name)[0],
            knobs=knobs,
            format=job.format or "",
            autocast=autocast,
            packed=fmt.packed,
        )
    )
    return made


def _use_cache(job: Job, arch: Arch, method: Method, recompute: Recompute, notes: Notes) -> bool:
    """Whether the forward builds a KV cache: checkpointing turns it off (modeling_layers.py)."""
    if not arch.use_cache or recompute.layers:
        return False
    if not method.caches:
        notes.add("model.use_cache", False, f"PEFT refuses {job.method} on a model that builds a KV cache")
        return False
    if job.knobs("model").get("use_cache") is None:
        why = "the model's config builds a KV cache in training too; set model.use_cache=false"
        notes.add("model.use_cache", True, why)
    return True


def _adapter_dtype(job: Job) -> DType | None:
    return None if job.adapter_dtype == "auto" else float_dtype("--adapter-dtype", job.adapter_dtype)


def _note_new_dtype(host: Host, method: Method, notes: Notes) -> None:
    """What dtype new parameters get where the job leaves it open."""
    if host.adapter_dtype is None and host.base_dtype.is_half and method.trains == "new":
        dtype, why = method.new_dtype_note(host)
        notes.add("adapter_dtype", dtype.label, why)


def _packs(fmt: Format, compute: DType, numerics: Numerics, ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """What the format makes of one linear layer's ops."""
    alone = Graph(regions=(Region(name="linear", ops=ops, entry=None, exit=ops[-1].out),))
    return fmt.apply(alone, compute, numerics).regions[0].ops


# -- what is asked ----------------------------------------------------------------------------------------------


def _check_settings(job: Job) -> None:
    for key in job.settings:
        prefix, _, rest = key.partition(".")
        if prefix not in PREFIXES or not rest:
            raise UnknownName("setting", key, (f"{p}." for p in PREFIXES), "settings are written PREFIX.KEY=VALUE")


def _check_unmodelled(job: Job) -> None:
    if job.task != "train":
        raise Unsupported(f"--task {job.task} is not modelled yet; only train is")
    if job.offload not in (None, "none", "activations"):
        raise Unsupported(f"--offload {job.offload} is not modelled yet; activations is")
    if knobs := job.knobs("precision"):
        raise Unsupported(f"precision.{next(iter(knobs))}: no setting of precision is modelled yet; leave it out")


def _method_name(job: Job) -> tuple[str, str | None, dict[str, Any]]:
    """(method, format it implies, format settings it implies)."""
    name = canonical(job.method)
    if name in ("qlora", "qdora"):
        return (
            "lora" if name == "qlora" else "dora",
            "nf4",
            {"double_quant": True} if job.format is None or formats.canonical(job.format) in ("nf4", "fp4") else {},
        )
    file, _ = methods.resolve_name(name)
    return name if methods.optimizer_of(name) is None else file, None, {}


def _format_reason(implied: str | None) -> str:
    return "qlora: 4-bit NormalFloat with double quantization" if implied else "weights stay in their own dtype"


def _method_knobs(job: Job) -> dict[str, Any]:
    knobs = job.knobs("method")
    if projection(job) is not None:
        return knobs
    known = methods.get(job.method).__dataclass_fields__
    for option, key, value in (("--rank", "r", job.rank), ("--target-modules", "target_modules", job.target_modules)):
        if value is None:
            continue
        if key not in known:
            raise RequestError(f"{option} means nothing to method {job.method}; leave it out")
        if knobs.get(key, value) != value:
            raise RequestError(f"{option} {value} contradicts method.{key}={knobs[key]}; give one of them")
        knobs[key] = value
    return knobs


def _adapter_shape(job: Job, arch: Arch, method: Method, notes: Notes) -> tuple[int | None, Names]:
    """The rank and the target modules that a method without a say of the job's uses; None where it has no such knob."""
    knobs = method.__dataclass_fields__
    rank: int | None = None
    targets: Names = None
    if "r" in knobs:
        given_rank = job.rank or job.knobs("method").get("r")
        rank = notes.default(given_rank, "rank", method.knob("r"), "the method's own default")
    if "target_modules" in knobs:
        given = job.target_modules or method.knob("target_modules")
        default = method.default_targets(arch.family)
        targets = (
            given if default is None else notes.default(given, "target_modules", default, f"PEFT's for {arch.family}")
        )
    return rank, targets


def _check_length(seq_len: int, arch: Arch, notes: Notes) -> None:
    if arch.max_positions is not None and seq_len > arch.max_positions:
        notes.add(
            "seq_len",
            seq_len,
            f"longer than the model's max_position_embeddings ({arch.max_positions}); memory as asked",
        )


def _recompute(job: Job, method_name: str, method: Method, fmt: Format, notes: Notes) -> tuple[str, Recompute]:
    """(the policy's name, what it does)."""
    prepared = fmt.prepares
    why = (
        "peft.prepare_model_for_kbit_training turns gradient checkpointing on" if prepared else "transformers' default"
    )
    name = notes.default(job.recompute, "recompute", "full" if prepared else "none", why)
    policy = policies.make(name, job.knobs("recompute"), offload=job.offload)
    if policy.layers and not method.checkpoints:
        raise Unsupported(f"PEFT cannot run {method_name} with gradient checkpointing; use --recompute none")
    if policy.reentrant and not method.reentrant:
        raise RequestError(f"recompute.use_reentrant=true: {method_name}'s library needs false, to pass its context on")
    return canonical(name), policy


def _loss(job: Job) -> LossStyle:
    knobs = job.knobs("loss")
    for key in knobs:
        if key != "style":
            raise UnknownName("setting of loss", key, ["style"])
    asked = knobs.get("style", STYLES[0])
    for style in STYLES:
        if asked == style:
            return style
    raise UnknownName("loss.style", str(asked), STYLES)
