"""Methods that train every weight and let the optimizer see a part of each gradient only: sparse in what changes, dense
in what is held."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from peftplan.errors import RequestError
from peftplan.graph.core import BUFFER, Graph, Region, Tensor, is_global
from peftplan.graph.edit import train
from peftplan.methods._layers import refuse_packed
from peftplan.methods.base import Family, Host, Method, Remark, Trains
from peftplan.units import DType


@dataclass(frozen=True)
class Masked(Method):
    """Full training with masks of gradients."""

    family: ClassVar[Family] = "selective"
    trains: ClassVar[Trains] = "base"
    title: ClassVar[str]
    """The method's own name."""

    @property
    @abstractmethod
    def share(self) -> float:
        """The part of the weights that changes."""

    @abstractmethod
    def mask(self, region: Region | None, weight: Tensor) -> DType | None:
        """The dtype of the mask that is held of a weight; None: none is. `region` is None outside of the layers."""

    def apply(self, graph: Graph, host: Host) -> Graph:
        del host
        if not 0 < self.share <= 1:
            raise RequestError(f"method {self.title}: {self.share} of the weights is not above 0 and at most 1")
        full = refuse_packed(train(graph, lambda _, __: True), self.title)
        return replace(full, buffers=(*full.buffers, *self._masks(full)))

    def _masks(self, graph: Graph) -> list[Tensor]:
        masks: dict[str, Tensor] = {}
        for region in graph.regions:
            layer = region.first_index
            for t in region.params():
                dtype = self.mask(None if layer is None else region, t)
                for i in range(region.count if dtype is not None and not is_global(t.name) else int(dtype is not None)):
                    name = t.name if is_global(t.name) else f"@{layer}.{i}.{t.name}"
                    masks[name] = Tensor(f"{name}.mask", t.shape, dtype or t.dtype, BUFFER)
        return list(masks.values())

    def remarks(self, graph: Graph) -> tuple[Remark, ...]:
        total = sum(t.numel * count for t, count in graph.params())
        why = (
            f"{self.share:.2%} of the weights, where the mask lets gradients through; every gradient and state is dense"
        )
        return (Remark("parameters.changed", round(self.share * total), why),)
