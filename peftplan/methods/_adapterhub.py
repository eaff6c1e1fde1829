"""What every method of AdapterHub's `adapters` library has in common: its models, and the dtype of its weights.

Mirrors adapters/wrappers/model.py init and adapters/wrappers/interfaces.py, adapters 1.3.0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.blocks.modeling import ADAPTERS_LLAMA, ADAPTERS_MISTRAL, TRANSFORMERS_4, Modeling
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Graph, Region, Tensor
from peftplan.graph.edit import split_runs
from peftplan.methods.base import Family, Host, Method
from peftplan.units import DType

MODELS = {"llama": ADAPTERS_LLAMA, "mistral": ADAPTERS_MISTRAL, "qwen2": TRANSFORMERS_4, "qwen3": TRANSFORMERS_4}
_MID = "residual_attn"
"""What enters a layer's feed-forward."""
HOOKED = ("qwen2", "qwen3")
"""Families whose layers, transformers' own, it hooks into; it replaces the others' with its own."""
COMMON = frozenset({"architecture", "init_weights", "init_weights_seed"})
"""Settings of its configs that memory does not feel."""
KEEPS_OUTPUT = ("relu", "tanh", "sigmoid")
KEEPS_INPUT = ("gelu", "silu", "swish", "leakyrelu")


@dataclass(frozen=True)
class AdapterHub(Method, ABC):
    """A method of `adapters`; knobs are named as in its configs."""

    family: ClassVar[Family] = "additive"
    libraries: ClassVar[tuple[str, ...]] = ("adapters",)
    base_config: ClassVar[str]
    """What `add_adapter` knows it as."""
    reentrant: ClassVar[bool] = False
    fused: ClassVar[tuple[str, ...]] = ()
    """Knobs of a fusion of adapters, beside those of the adapters; `num_adapters` says how many."""

    parts: ClassVar[tuple[str, ...]] = ()
    """Knobs that are each a part's settings, of a union of methods, in the order of its configs."""

    def members(self) -> Iterator[AdapterHub]:
        """Those parts, of a union."""
        return iter(())

    @final
    def apply(self, graph: Graph, host: Host) -> Graph:
        return _with_context(self.adapt(graph, host, new_dtype(host, graph)), host)

    @abstractmethod
    def adapt(self, graph: Graph, host: Host, dtype: DType) -> Graph:
        """The graph with the method's parameters, of `dtype`, in it."""

    @final
    def new_dtype_note(self, host: Host) -> tuple[DType, str]:
        if host.numerics.autocast is not None:
            return DType.float32, "adapters makes its modules in fp32"
        return host.base_dtype, "its fp32 modules run on a half-precision model under autocast only: cast to its dtype"

    @final
    def modeling(self, family: str) -> Modeling:
        if family in MODELS:
            return MODELS[family]
        names = ", ".join(MODELS)
        raise Unsupported(f"adapters 1.3.0 has no interface for {family} that is modelled; it has for {names}")


def hooked(host: Host) -> bool:
    """Whether adapters sit in hooks of transformers' own layers."""
    return host.arch.family in HOOKED


def check_left_out(layers: tuple[int, ...], host: Host) -> None:
    """`leave_out`. Raises RequestError for layers that the model does not have, and for all that it has."""
    if len({*layers}) >= host.arch.num_layers:
        raise RequestError("method.leave_out names every layer: nothing trains; leave one of them in")
    beyond = [i for i in layers if i >= host.arch.num_layers]
    if beyond:
        raise RequestError(f"method.leave_out names layer {beyond[0]}; the model has {host.arch.num_layers}")


def check_non_linearity(name: str) -> None:
    """`non_linearity`. Raises Unsupported for those whose formula is not known here."""
    if name.lower() not in KEEPS_OUTPUT + KEEPS_INPUT:
        known = ", ".join(KEEPS_OUTPUT + KEEPS_INPUT)
        raise Unsupported(f"method.non_linearity={name} is not modelled; use one of {known}")


def squeezed(b: Builder, x: Tensor, name: str) -> Tensor:
    """Activation_Function_Class (adapters/methods/modeling.py)."""
    label = name.lower()
    return b.squash(x, label=label) if label in KEEPS_OUTPUT else b.activate(x, label=label)


def gate(b: Builder, x: Tensor, dtype: DType, *, outputs: int = 1) -> Tensor:
    """`use_gating`: a number of each row, the mean over its tokens of a sigmoid of what enters: (B, 1, outputs)."""
    weight = b.weight("gate.weight", outputs, x.shape[-1], dtype=dtype, kind=ADAPTER)
    bias = b.weight("gate.bias", outputs, dtype=dtype, kind=ADAPTER)
    opened = b.squash(b.linear(x, weight, bias, label="gate"), label="gate_sigmoid")
    mean = Tensor("", (x.shape[0], 1, outputs), opened.dtype)
    return b.formula("gate_mean", mean, opened, grads=(Grad(opened, opened.logical_bytes),))


def new_dtype(host: Host, graph: Graph) -> DType:
    """The dtype of new weights: float32 as they are made, or the hidden states' outside autocast, where no other runs.

    Raises RequestError for a dtype that its linear layers would refuse.
    """
    stream = graph.regions[0].exit.dtype
    autocast = host.numerics.autocast is not None
    asked = host.adapter_dtype or (DType.float32 if autocast else stream)
    if not autocast and asked is not stream:
        raise RequestError(
            f"--adapter-dtype {asked.label} on {stream.label} hidden states: adapters' linear layers do not cast; "
            f"use --precision bf16-mixed, or --adapter-dtype {stream.label}"
        )
    return asked


def _with_context(graph: Graph, host: Host) -> Graph:
    """ForwardContext, which holds where each row's tokens begin and how many they are; a checkpoint's function holds
    the context (adapters/model_mixin.py, forward_context and gradient_checkpointing_enable)."""
    first, *rest = graph.regions
    mask = next(t for t in graph.inputs if t.name == "@attention_mask")
    b = Builder(host.numerics, "context.")
    rows = tuple(b.plain(label, mask.shape[0], dtype=DType.int64, ins=(mask,)) for label in ("seqlens", "offsets"))
    if host.recomputes:
        b.keep(*rows)
    held = () if host.recomputes else tuple(t.name for t in rows)
    front = replace(first, ops=(*b.ops, *first.ops), held=(*first.held, *held))
    whole = replace(graph, regions=(front, *rest))
    return _with_residuals(whole, host) if hooked(host) else whole


def _with_residuals(graph: Graph, host: Host) -> Graph:
    """The context holds the last residuals that its hooks met: what entered a layer, and its feed-forward, the latter
    until the next layer's takes its place (adapters/methods/bottleneck.py, _residual_hook_fn)."""
    last = host.arch.num_layers - 1
    split = split_runs(graph, lambda index: index == last)
    return replace(split, regions=tuple(_with_residual(r, host, last) for r in split.regions))


def _with_residual(region: Region, host: Host, last: int) -> Region:
    if region.first_index is None or region.entry is None:
        return region
    at = next(i for i, op in enumerate(region.ops) if op.name == _MID)
    mid = region.ops[at].out
    if last and (host.recomputes or mid.dtype is not DType.float32):  # else the norm keeps it itself
        b = Builder(host.numerics, "context.")
        before = b.plain("residual", *mid.shape, dtype=mid.dtype)
        made = b.ops[:]
        b.ops.clear()
        b.hold(before)
        region = replace(region, ops=(*made, *region.ops[: at + 1], *b.ops, *region.ops[at + 1 :]))
    if host.recomputes:
        return replace(region, trails=(_MID,), lingers=(_MID,) if region.first_index == last else ())
    if region.first_index == last and region.entry is not None:
        return replace(region, held=(*region.held, region.entry.storage, _MID))
    return region
