"""Methods that put the same branch on every chosen linear layer: the knobs they share, and how they are put on.

Mirrors peft/tuners/tuners_utils.py BaseTuner.inject_adapter, peft 0.21.2.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, modules
from peftplan.methods._linears import Plan, adapt, packed, plan, train_biases
from peftplan.methods._saved import save_modules
from peftplan.methods.base import Family, Host, Method
from peftplan.methods.targets import DEFAULTS, Names, targets


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
    packs: ClassVar[bool] = False
    """Whether PEFT has it on packed weights."""
    on_packed: ClassVar[bool] = False
    """Whether `branch` says what it does there."""
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

    @abstractmethod
    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        """What runs in place of a chosen module, ending in its output."""

    def embedding(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        """What runs in place of a chosen embedding. Raises Unsupported where nothing is modelled there."""
        del module, size, host
        raise Unsupported(f"{self.title} on embeddings is not modelled; leave embed_tokens out of --target-modules")

    def buffers(self, chosen: list[Chosen], host: Host) -> tuple[Tensor, ...]:
        """Tensors beside the parameters, given every adapted module."""
        del chosen, host
        return ()

    def apply(self, graph: Graph, host: Host) -> Graph:
        self._check_lacks()
        self.check()
        family = host.arch.family
        wanted = self.default_targets(family) if self.target_modules is None else self.target_modules
        choice = targets(
            family,
            wanted,
            excluded=self.exclude_modules,
            layers=self.layers_to_transform,
            pattern=self.layers_pattern,
            saved=self.modules_to_save,
        )
        planned = plan(graph, choice, self.size)

        def branch(module: Module, size: int) -> tuple[Op, ...]:
            if module.site == "embed":
                return self.embedding(module, size, host)
            if packed(module) is not None and not self.on_packed:
                what = f"{self.title} on packed weights is not modelled" if self.packs else (
                    f"PEFT has no {self.title} on packed weights")  # fmt: skip
                raise Unsupported(f"{what}; use an unquantized --format")
            return self.branch(module, size, host)

        adapted = train_biases(adapt(graph, planned, branch), planned, self.trained_biases())
        buffers = (*adapted.buffers, *self.buffers(list(chosen_modules(graph, planned)), host))
        return save_modules(replace(adapted, buffers=buffers), self.modules_to_save)

    def _check_lacks(self) -> None:
        for knob in self.lacks:
            if getattr(self, knob) or (knob == "layers_to_transform" and self.layers_pattern):
                raise RequestError(f"method.{knob}: PEFT's {self.title} has no such setting; leave it out")


class Chosen(NamedTuple):
    """An adapted module of one layer."""

    module: Module
    size: int


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
    b = Builder(host.numerics, f"{module.path}.")
    return b, module.out._replace(name=f"{module.out.name}.base")


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
