"""PEFT's `target_parameters`: LoRA on a weight itself, W + (alpha/r) BA in place of W.

Mirrors peft/tuners/lora/layer.py ParamWrapper, _LoraParameterProxy and _LoraFactorsProxy, and
peft/tuners/tuners_utils.py BaseTuner._inject_parameters, peft 0.21.2; torch/nn/utils/parametrize.py
ParametrizationList, which computes the weight once more when it is put on. Two dimensions are a matrix, three a stack
of experts' matrices.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Graph, Need, Op, Region, Tensor
from peftplan.graph.edit import split_runs
from peftplan.graph.ops import Embedding
from peftplan.graph.ops.shapes import Detached
from peftplan.methods.base import Host
from peftplan.methods.targets import full_path
from peftplan.units import DType


class OnWeights(NamedTuple):
    """Which weights, and with what."""

    names: tuple[str, ...]
    """Endings of full names."""
    rank: Callable[[str], int]
    """Of a weight's full name."""
    active: int
    trained: int
    host: Host

    def wants(self, name: str) -> bool:
        return any(name == n or name.endswith(f".{n}") for n in self.names)


def adapt_weights(graph: Graph, on: OnWeights) -> Graph:
    """The graph with every chosen weight adapted. Raises RequestError where none is, or PEFT cannot."""
    split = split_runs(graph, lambda index: tuple(_chosen(r, index, on) for r in graph.regions))
    regions = tuple(_rewritten(r, _chosen(r, r.first_index or 0, on), on) for r in split.regions)
    if regions == split.regions:
        raise RequestError(
            f"method.target_parameters {','.join(on.names)!r} matches nothing; write the ends of names of weights, "
            "e.g. q_proj.weight"
        )
    return replace(split, regions=regions)


def _chosen(region: Region, index: int, on: OnWeights) -> tuple[tuple[str, int], ...]:
    """Names of the region's chosen weights, and their ranks."""
    found = {key: on.rank(full) for key, full in _names(region, index) if on.wants(full)}
    return tuple(sorted(found.items()))


def _names(region: Region, index: int) -> Iterator[tuple[str, str]]:
    """Every base weight, as the region's op calls it and as the model does."""
    for op in region.ops:
        for t in op.ins:
            if t.is_param and t.kind != ADAPTER:
                yield _key(op, t), full_path(region, _key(op, t), index)


def _key(op: Op, t: Tensor) -> str:
    return "lm_head.weight" if op.site == "head" else t.name.removeprefix("@")


def _rewritten(region: Region, chosen: tuple[tuple[str, int], ...], on: OnWeights) -> Region:
    ranks = dict(chosen)
    if not ranks:
        return region
    adapted = {t.name.split(".lora_")[0] for t in region.params() if t.kind == ADAPTER}
    new: list[Op] = []
    for _, run in groupby(region.ops, lambda op: (op.site, op.part)):
        ops = tuple(run)
        weights = {t.name: (_key(op, t), t) for op in ops for t in op.ins if t.is_param and t.kind != ADAPTER
                   and _key(op, t) in ranks}  # fmt: skip
        for key, weight in weights.values():
            _check(weight, adapted, key)
            ops = _wrapped(ops, weight, key, ranks[key], on)
        new += ops
    return replace(region, ops=tuple(new))


def _check(weight: Tensor, adapted: set[str], key: str) -> None:
    if weight.stored_bytes is not None:
        raise RequestError(
            f"PEFT adapts the module in place of a packed weight, as {key} is; name it in --target-modules, or use an "
            "unquantized --format"
        )
    if len(weight.shape) not in (2, 3):
        raise RequestError(f"PEFT adapts weights of 2 or 3 dimensions, and {key} has {len(weight.shape)}; leave it out")
    if key.rpartition(".")[0] in adapted:
        raise RequestError(
            f"PEFT adapts a module or its weight, and {key} is in --target-modules too; leave one of them out, with "
            "--target-modules '' for weights alone"
        )


def _wrapped(ops: tuple[Op, ...], weight: Tensor, key: str, rank: int, on: OnWeights) -> tuple[Op, ...]:
    """A module's ops with the adapted weight in place of its own."""
    first = ops[0]
    b = Builder(on.host.numerics, f"{key}.")
    with b.marked(first.site, "down"):
        merged, held = _folded(b, weight, rank, on) if len(weight.shape) == 3 else _summed(b, weight, rank, on)
    *ahead, merge = b.ops
    b.ops.clear()
    with b.marked(first.site, "extra"):
        b.hold(merged, *held)
    part = first.part if isinstance(first, Embedding) else "down"
    reader = next(i for i, op in enumerate(ops) if weight in op.ins)  # it is made when it is first read
    swapped = [replace(op.over(tuple(merged if t.name == weight.name else t for t in op.ins), op.out), part=part)
               for op in ops]  # fmt: skip
    return (*ahead, *swapped[:reader], merge, *swapped[reader:], *b.ops)


def _weight(b: Builder, on: OnWeights, label: str, number: int, *shape: int) -> Tensor:
    name = f"{label}.weight.{number}" if number else f"{label}.weight"
    return b.weight(name, *shape, dtype=on.host.new_dtype, kind=ADAPTER)._replace(trainable=number < on.trained)


def _summed(b: Builder, weight: Tensor, rank: int, on: OnWeights) -> tuple[Tensor, tuple[Tensor, ...]]:
    """W + the sum of the adapters' changes, each in W's dtype, and what the wrapper holds."""
    out, wide = weight.shape
    total: Tensor | None = None
    for number in range(on.active):
        a, up = _weight(b, on, "lora_A", number, rank, wide), _weight(b, on, "lora_B", number, out, rank)
        if on.host.numerics.backend == "cpu" and a.dtype.is_half:  # get_delta_weight
            a, up = b.cast(a, DType.float32, label="a32"), b.cast(up, DType.float32, label="b32")
        change = b.scale(b.matmul(up, a, out, wide, inner=rank, label="BA"))
        change = b.cast(b.cast(change, on.host.new_dtype, label="delta"), weight.dtype, label="delta_weight")
        total = change if total is None else b.add(total, change, label="changes")
    assert total is not None
    b.plain("checked", out, wide, dtype=weight.dtype)
    return b.add(weight, total, label="merged"), (total,)


def _folded(b: Builder, weight: Tensor, rank: int, on: OnWeights) -> tuple[Tensor, tuple[Tensor, ...]]:
    """baddbmm(W, B, A) of every expert's matrices; B is laid out (out, rank, experts)."""
    if on.active > 1:
        raise Unsupported("several active adapters on stacked weights are not modelled; set active_adapters to 1")
    experts, out, wide = weight.shape
    a = b.alias(_weight(b, on, "lora_A", 0, rank * experts, wide))
    up = b.alias(_weight(b, on, "lora_B", 0, out, rank * experts))
    rhs = b.cast(b.view(a, experts, rank, wide, label="A_stack"), weight.dtype, label="rhs")
    lhs = b.cast(b.view(up, experts, out, rank, label="B_stack", grad_copied=True), weight.dtype, label="lhs")
    for kind, label in ((Checked, "checked"), (Folded, "merged")):
        name = b.name(label)
        made = Tensor(name, weight.shape, weight.dtype)
        b.ops.append(kind(name=name, ins=(weight, lhs, rhs), out=made, part="down"))
    return b.ops[-1].out, (lhs, rhs)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Baddbmm(Op, ABC):
    """W + alpha lhs rhs, W frozen."""

    def flops(self) -> int:
        return 2 * self.out.numel * self.ins[1].shape[-1]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Checked(_Baddbmm, Detached):
    """The product that is made to see that dtype and shape stay: its graph dies at once."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Folded(_Baddbmm):
    """Keeps each factor where the other trains; alpha multiplies a gradient into a new tensor (derivatives.yaml,
    baddbmm)."""

    def grad_flops(self, need: Need) -> int:
        return self.flops() * sum(t.name in need for t in self.ins[1:])

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        _, lhs, rhs = self.ins
        return ((lhs,) if rhs.name in need else ()) + ((rhs,) if lhs.name in need else ())

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, t.logical_bytes, t.logical_bytes) for t in self.ins[1:] if t.name in need)
