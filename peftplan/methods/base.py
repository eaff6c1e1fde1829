"""What a method is: a transform of the graph, given the host model it is put on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from peftplan.arch.core import Arch
from peftplan.graph.blocks.modeling import TRANSFORMERS_5, Modeling
from peftplan.graph.blocks.setup import Batch
from peftplan.graph.builder import Numerics
from peftplan.graph.core import Graph, Op
from peftplan.graph.mesh import ONE, Mesh
from peftplan.units import DType

Family = Literal["selective", "additive", "soft prompt", "reparameterized", "hybrid", "memory-frugal"]
"""What a method does to a model: train a part of it; add modules; add tokens; write a change of its weights in fewer
numbers; several of these; train all of it with less memory."""

Trains = Literal["new", "base", "like base"]
"""New weights, in a dtype of their own; the model's; new ones in the dtype of the model's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What a method may know about the model it adapts."""

    arch: Arch
    numerics: Numerics
    adapter_dtype: DType | None
    """The dtype of new parameters; None: PEFT's rule, half-precision adapters are held in fp32."""
    base_dtype: DType
    packs: Callable[[tuple[Op, ...]], tuple[Op, ...]]
    """What the base's format makes of a linear layer's ops: for methods that run one of them on another input."""
    recomputes: bool = False
    """Whether layers are checkpointed."""
    mesh: Mesh = ONE
    """Over how many ranks its operations are spread."""

    @property
    def new_dtype(self) -> DType:
        """peft.tuners.tuners_utils.cast_adapter_dtype: float16 and bfloat16 adapters become float32."""
        if self.adapter_dtype is not None:
            return self.adapter_dtype
        return DType.float32 if self.base_dtype.is_half else self.base_dtype


class Remark(NamedTuple):
    """What an answer should say of a method beyond its figures."""

    what: str
    value: Any
    why: str


@dataclass(frozen=True)
class Method(ABC):
    """A frozen set of knobs, named as in the library people use it from, and one transform."""

    def knob(self, name: str) -> Any:
        """The value of one of its settings."""
        return getattr(self, name)

    family: ClassVar[Family]
    libraries: ClassVar[tuple[str, ...]] = ("PEFT",)
    """Whose implementation is mirrored, first, and others that have it; none: the paper's."""
    trains: ClassVar[Trains] = "new"
    loop_knobs: ClassVar[frozenset[str]] = frozenset()
    """Settings that its library's config does not have: what the training loop does with it."""
    checkpoints: ClassVar[bool] = True
    """Whether the libraries can run it with gradient checkpointing."""
    caches: ClassVar[bool] = True
    """Whether they can run it while the model builds a KV cache."""
    masters: ClassVar[DType | None] = None
    """The dtype of the copies of trained weights that the optimizer steps over in their place, where it has some."""

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

    splits: ClassVar[bool] = False
    """Whether its library runs it on linear layers of which a rank holds a part."""
    forwards: ClassVar[int] = 1
    """How often a step runs the model forward."""
    backward: ClassVar[bool] = True
    """Whether it needs gradients: without, nothing is kept for them, and the optimizer has no part in the step."""
    empties_cache: ClassVar[bool] = False
    """Whether its implementation empties the allocator's cache after every step."""

    @property
    def stage(self) -> str:
        """What trains in this stage, of a method that goes through several."""
        return ""

    def stages(self, arch: Arch) -> tuple[Method, ...]:
        """What it goes through, a method for each set of weights that trains together: the answer is that of the one
        with the highest peak. Where equal layers take turns, the one that is sure to be the highest is enough."""
        del arch
        return (self,)

    def remembered(self, graph: Graph) -> Graph:
        """The graph whose trained weights have optimizer states: more than those that train in this stage, where the
        states of earlier ones stay."""
        return graph

    def aside(self, gradient_bytes: int) -> tuple[int, ...]:
        """Bytes of the tensors that it makes for a moment of a gradient of this size, before the optimizer's step."""
        del gradient_bytes
        return ()

    def between(self, graph: Graph) -> tuple[int, ...]:
        """Bytes of the tensors that it makes between two steps, as many as are alive together at the most."""
        del graph
        return ()

    def remarks(self, graph: Graph) -> tuple[Remark, ...]:
        """What the answer should say besides, of the graph that it made."""
        del graph
        return ()

    def widens(self, graph: Graph, host: Host) -> Mapping[int | str, frozenset[str]]:
        """The linear layers (paths, by layer or region) that hand on their input's dtype under autocast."""
        del graph, host
        return {}

    @abstractmethod
    def apply(self, graph: Graph, host: Host) -> Graph:
        """The graph with this method's parameters added and everything else frozen or trained as it says."""
