"""What a method is: a transform of the graph, given the host model it is put on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from peftplan.arch.core import Arch
from peftplan.graph.blocks.decoder import Batch
from peftplan.graph.blocks.modeling import TRANSFORMERS_5, Modeling
from peftplan.graph.builder import Numerics
from peftplan.graph.core import Graph
from peftplan.units import DType


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What a method may know about the model it adapts."""

    arch: Arch
    numerics: Numerics
    adapter_dtype: DType | None
    """The dtype of new parameters; None: PEFT's rule, half-precision adapters are held in fp32."""
    base_dtype: DType
    recomputes: bool = False
    """Whether layers are checkpointed."""

    @property
    def new_dtype(self) -> DType:
        """peft.tuners.tuners_utils.cast_adapter_dtype: float16 and bfloat16 adapters become float32."""
        if self.adapter_dtype is not None:
            return self.adapter_dtype
        return DType.float32 if self.base_dtype.is_half else self.base_dtype


@dataclass(frozen=True)
class Method(ABC):
    """A frozen set of knobs, named as in the library people use it from, and one transform."""

    def knob(self, name: str) -> Any:
        """The value of one of its settings."""
        return getattr(self, name)

    checkpoints: ClassVar[bool] = True
    """Whether the libraries can run it with gradient checkpointing."""

    reentrant: ClassVar[bool] = True
    """Whether they can run it with `use_reentrant` checkpoints."""

    def seen(self, batch: Batch) -> Batch:
        """What the model sees of a batch: longer where the method puts tokens or a cache in front of it."""
        return batch

    def modeling(self, family: str) -> Modeling:
        """Whose modelling code the library runs a family with. Raises Unsupported where it runs none of it."""
        del family
        return TRANSFORMERS_5

    def new_dtype_note(self, host: Host) -> tuple[DType, str]:
        """The dtype of new parameters on a half-precision base where the job leaves it open, and why."""
        del host
        return DType.float32, "PEFT holds adapters in fp32 on a half-precision base"

    def default_targets(self, family: str) -> str | tuple[str, ...] | None:
        """The modules adapted where the job names none; None where the method decides that for itself."""
        del family
        return None

    @abstractmethod
    def apply(self, graph: Graph, host: Host) -> Graph:
        """The graph with this method's parameters added and everything else frozen or trained as it says."""
