"""A union of AdapterHub's methods: each of them put on the model that the one before made.

Mirrors adapters/configuration/adapter_config.py ConfigUnion, adapters 1.3.0, whose parts never sit in one place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, TypeVar, final

from peftplan import plugins
from peftplan.errors import RequestError
from peftplan.graph.blocks.setup import Batch
from peftplan.graph.core import Graph
from peftplan.methods._adapterhub import COMMON, AdapterHub
from peftplan.methods.base import Family, Host
from peftplan.units import DType

P = TypeVar("P", bound=AdapterHub)


@dataclass(frozen=True)
class HubUnion(AdapterHub, ABC):
    """A ConfigUnion; each knob holds the settings of one part, over those that the union has for it."""

    family: ClassVar[Family] = "hybrid"
    fixed: ClassVar[tuple[str, ...]] = ()
    """Settings of its parts that the union sets itself, whatever a part says."""

    @abstractmethod
    def members(self) -> Iterator[AdapterHub]:
        """Its parts with their settings, in the order of `parts`."""

    def part(self, name: str, cls: type[P], **own: Any) -> P:
        """One part: `own` is what the union has it for where nothing is said. Raises RequestError as a method does."""
        said = self.knob(name) or {}
        for knob in self.fixed:
            if knob in said:
                raise RequestError(f"method.{name}: {self.base_config} sets {knob} itself; leave it out")
        harmless = COMMON | {"alpha", "encoder_prefix", "cross_prefix"}
        return plugins.configure(cls, {**own, **said}, what=f"method {self.base_config}: {name}", harmless=harmless)

    @final
    def seen(self, batch: Batch) -> Batch:
        return reduce(lambda found, part: part.seen(found), self.members(), batch)

    @final
    def adapt(self, graph: Graph, host: Host, dtype: DType) -> Graph:
        return reduce(lambda made, part: part.adapt(made, host, dtype), self.members(), graph)
