"""Methods that put the same branch on every chosen linear layer: the knobs they share, and how they are put on.

Mirrors peft/tuners/tuners_utils.py BaseTuner.inject_adapter, peft 0.21.2.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.blocks.decoder import module_order
from peftplan.graph.builder import Builder
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, modules
from peftplan.graph.ops import BITSANDBYTES, Linear, MatMul
from peftplan.methods._linears import (
    Plan,
    adapt,
    check_all_linear,
    check_plain,
    narrowed,
    packed,
    plan,
    sees_autocast,
    train_biases,
)
from peftplan.methods._saved import save_modules
from peftplan.methods.base import Family, Host, Method
from peftplan.methods.targets import DEFAULTS, Names, Targets, targets


@dataclass(frozen=True)
class OnLinears(Method):
    """The knobs that every such PEFT config has."""

    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: Names = None
    modules_to_save: tuple[str, ...] | None = None
    family: ClassVar[Family] = "reparameterized"
    title: ClassVar[str]
    """Its name in messages."""
    no_4bit: ClassVar[str] = ""
    """Why PEFT cannot put it on 4-bit weights, if it cannot; it takes any kind of linear layer otherwise."""
    no_8bit: ClassVar[str] = ""
    """The same of 8-bit weights."""
    layers: ClassVar[frozenset[str]] = frozenset()
    """Packed layers besides bitsandbytes' that PEFT has it for (`PackedLinear.layer`)."""
    reads_weight: ClassVar[bool] = False
    """Whether PEFT computes with the base's weight when it is put on, which a library's tensor class may refuse."""
    in_place: ClassVar[bool] = False
    """Whether PEFT adds its branch to the layer's output in place. What bitsandbytes' 8-bit function returns is a view
    of its own making (autograd/_functions.py, MatMul8bitLt; MatMul8bitFp, a CPU's, where there is a bias)."""
    returns_input: ClassVar[bool] = False
    """Whether PEFT casts what comes out to the dtype of what came in, whatever autocast computed in."""
    lacks: ClassVar[tuple[str, ...]] = ()
    """Knobs of other methods that PEFT's config does not have."""
    defaults: ClassVar[dict[str, tuple[str, ...]]] = DEFAULTS
    """PEFT's target modules by family."""

    def default_targets(self, family: str) -> Names:
        return self.defaults.get(family)

    def check(self) -> None:
        """Raises RequestError for knobs that do not go together."""

    def trained_biases(self) -> str:
        """PEFT's `bias`, where the method has it."""
        return "none"

    def size(self, path: str) -> int:
        """The knob that PEFT lets patterns of names set per module (a rank, a block's size)."""
        del path
        return 0

    def plan(self, graph: Graph, choice: Targets) -> Plan[int]:
        """What each adapted module of each layer is given."""
        by_pattern_of_names = any(isinstance(value, Mapping) and value for value in vars(self).values())
        return plan(graph, choice, self.size, by_layer=by_pattern_of_names)

    @abstractmethod
    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        """What runs in place of a chosen module, ending in its output."""

    def embedding(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        """What runs in place of a chosen embedding. Raises Unsupported where nothing is modelled there."""
        del module, size, host
        raise Unsupported(f"{self.title} on embeddings is not modelled; leave embed_tokens out of --target-modules")

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        """Tensors beside the parameters, given every adapted module."""
        del chosen, host
        return ()

    def unread(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        """The adapted layers' own weights, where nothing reads them any more."""
        del chosen, host
        return ()

    def planned(self, graph: Graph, host: Host) -> Plan[int]:
        """Which modules are adapted, each with its `size`."""
        family = host.arch.family
        wanted = self.default_targets(family) if self.target_modules is None else self.target_modules
        check_all_linear(graph, wanted)
        choice = targets(
            family,
            wanted,
            excluded=self.exclude_modules,
            layers=self.layers_to_transform,
            pattern=self.layers_pattern,
            saved=self.modules_to_save,
        )
        return self.plan(graph, choice)

    def widens(self, graph: Graph, host: Host) -> dict[int | str, frozenset[str]]:
        if not self.returns_input:
            return {}
        return {key: frozenset(paths) for key, paths in self.planned(graph, host).items()}

    def apply(self, graph: Graph, host: Host) -> Graph:
        self._check_lacks()
        self.check()
        planned = self.planned(graph, host)

        def branch(module: Module, size: int) -> tuple[Op, ...]:
            if module.site == "embed":
                return self.embedding(module, size, host)
            self._check_packed(module, host)
            ops = self.branch(narrowed(module), size, host)
            self._check_products(ops, module)
            return ops

        adapted = adapt(graph, planned, branch, name=self.title, embeds=True, layers=self.layers)
        adapted = train_biases(adapted, planned, self.trained_biases())
        chosen = _Adapted(graph, planned)
        buffers = (*adapted.buffers, *self.buffers(chosen, host))
        unused = (*adapted.unused, *self.unread(chosen, host))
        return save_modules(replace(adapted, buffers=buffers, unused=unused), self.modules_to_save)

    def _check_packed(self, module: Module, host: Host) -> None:
        kernel = packed(module)
        if kernel is None or kernel.layer != BITSANDBYTES:
            if kernel is None and self.reads_weight:
                check_plain(module, self.title)
            return
        bits, why = (4, self.no_4bit) if kernel.adapters_clone else (8, self.no_8bit)
        if bits == 8 and self.in_place and (host.numerics.backend == "cuda" or bias_of(module) is not None):
            why = "PEFT adds to the layer's output in place, and bitsandbytes' is a view, which torch refuses"
        if why:
            raise Unsupported(f"{self.title} on {bits}-bit weights: {why}; use an unquantized --format")

    def _check_products(self, ops: tuple[Op, ...], module: Module) -> None:
        """torch multiplies matrices of one dtype only."""
        for op in ops:
            if isinstance(op, (Linear, MatMul)) and op.ins[0].dtype is not op.ins[1].dtype:
                left, right = (t.dtype.label for t in op.ins[:2])
                raise RequestError(
                    f"PEFT's {self.title} multiplies {left} by {right} in {module.path}, which torch refuses; "
                    "leave --adapter-dtype out"
                )

    def _check_lacks(self) -> None:
        for knob in self.lacks:
            if getattr(self, knob) or (knob == "layers_to_transform" and self.layers_pattern):
                raise RequestError(f"method.{knob}: PEFT's {self.title} has no such setting; leave it out")


def in_order(graph: Graph, planned: Plan[int]) -> Iterator[tuple[int | str, Module]]:
    """Every adapted module with its layer (or region), as `named_modules()` meets them."""
    for region in graph.regions:
        first = region.first_index
        keys: Iterable[int | str] = [region.name] if first is None else range(first, first + region.count)
        found = sorted((m for _, _, m in modules(region)), key=lambda m: module_order(m.path))
        yield from ((key, m) for key in keys for m in found if m.path in planned[key])


class Chosen(NamedTuple):
    """An adapted module of one layer."""

    module: Module
    size: int


@dataclass(frozen=True)
class _Adapted(Collection[Chosen]):
    """Every adapted module, once per layer; found when first asked for, which most methods never do."""

    graph: Graph
    planned: Plan[int]

    @cached_property
    def _found(self) -> tuple[Chosen, ...]:
        return tuple(chosen_modules(self.graph, self.planned))

    def __iter__(self) -> Iterator[Chosen]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, module: object) -> bool:
        return module in self._found


def widest(chosen: Collection[Chosen]) -> tuple[int, int]:
    """The most inputs and the most outputs of any adapted module: the sides of a pair that all of them share."""
    return max(c.module.in_features for c in chosen), max(c.module.out_features for c in chosen)


def chosen_modules(graph: Graph, planned: Plan[int]) -> Iterator[Chosen]:
    """Every adapted module, once per layer."""
    for region in graph.regions:
        first = region.first_index
        keys: Iterable[int | str] = [region.name] if first is None else range(first, first + region.count)
        for _, _, m in modules(region):
            yield from (Chosen(m, planned[key][m.path]) for key in keys if m.path in planned[key])


def by_pattern(path: str, default: int, patterns: Mapping[str, int]) -> int:
    """peft.utils.other.get_pattern_key: the first pattern that matches the end of the module's name."""
    return next((n for pattern, n in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


def builder(module: Module, host: Host) -> tuple[Builder, Tensor]:
    """A builder with the module's names, and the value that its base layer now writes."""
    b = Builder(host.numerics, f"{module.path}.", host.mesh)
    return b, module.out._replace(name=f"{module.out.name}.base")


def result_of(b: Builder, base: Tensor, module: Module) -> Tensor:
    """What PEFT adds its branch to: the base's output, cloned where that is 4-bit (maybe_clone_base_result)."""
    kernel = packed(module)
    return b.copy(base, label="clone") if kernel is not None and kernel.adapters_clone else base


def returned(b: Builder, total: Tensor, x: Tensor, module: Module, host: Host) -> Tensor:
    """`total.to(x.dtype)`: in PEFT's bnb.py x has been cast for the adapter by then, but under autocast."""
    cast = packed(module) is not None and not sees_autocast(host)
    return b.cast(total, (x if cast else module.x).dtype, label="out")


def bias_of(module: Module) -> Tensor | None:
    """The module's bias, if it has one."""
    return next((t for op in module.ops for t in op.ins if t.is_param and len(t.shape) == 1), None)


def check_rank(rank: int, name: str = "--rank") -> None:
    if rank < 1:
        raise RequestError(f"{name} {rank}: the rank must be at least 1")


def check_share(name: str, value: float) -> None:
    """A dropout probability."""
    if not 0 <= value < 1:
        raise RequestError(f"method.{name}={value}: must be at least 0 and below 1")
