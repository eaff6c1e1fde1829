"""What a block needs besides the architecture: the batch, the dtypes of weights, whose code runs."""

from __future__ import annotations

from dataclasses import dataclass

from peftplan.graph.blocks.kernels import TRANSFORMERS, Kernels
from peftplan.graph.blocks.loss import LossStyle
from peftplan.graph.blocks.modeling import TRANSFORMERS_5, Modeling
from peftplan.graph.builder import Numerics
from peftplan.graph.core import Tensor
from peftplan.graph.mesh import ONE, Mesh
from peftplan.units import DType


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The shape of one micro-batch: B rows of S tokens; `masked` where a padding mask is present; `documents` in each
    row, told apart by their positions where they are several."""

    size: int
    seq: int
    masked: bool = False
    documents: int = 1
    past: int = 0
    """Tokens before the first whose keys and values come with the batch, as a cache."""
    prefix: int = 0
    """Tokens whose keys and values every layer puts before its own, where the model's mask does not count them."""
    prefix_computed: bool = True
    """Whether they come out of a matrix product, and not straight from a weight."""
    groups: int = 1
    """Parts of a row that attention looks at alone, half of the heads at parts that lie half a part further on."""

    @property
    def keys(self) -> int:
        """How many tokens attention looks at."""
        return self.past + self.seq

    @staticmethod
    def of(batching: str, *, size: int, seq: int) -> Batch:
        """B sequences of S tokens: padded or exact as they are, packed into one row of B*S."""
        if batching == "packed":
            return Batch(size=1, seq=size * seq, documents=size)
        return Batch(size=size, seq=seq, masked=batching == "padded")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightTypes:
    """The dtypes weights are held in: linear layers of the blocks, norms, the embedding, the head."""

    linear: DType
    norm: DType
    embedding: DType
    head: DType
    bias: DType
    opaque: bool = False
    """Whether the blocks' linear layers run in kernels that autocast does not reach (they return the input's dtype)."""
    widened: frozenset[str] = frozenset()
    """Linear layers (by path) whose adapters cast what autocast computes back to the input's dtype."""

    @property
    def unpacked(self) -> DType:
        """Of what is no module that formats pack: norms, routers, stacked experts."""
        return self.norm

    @staticmethod
    def all(dtype: DType) -> WeightTypes:
        return WeightTypes(linear=dtype, norm=dtype, embedding=dtype, head=dtype, bias=dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Everything a block needs besides the architecture."""

    batch: Batch
    types: WeightTypes
    numerics: Numerics
    attention: str = "sdpa"
    use_cache: bool = True
    """Whether transformers builds a KV cache during the forward."""
    loss: LossStyle = "shifted_labels"
    """Which releases of transformers the loss is computed as (`blocks/loss.py`)."""
    modeling: Modeling = TRANSFORMERS_5
    """Whose modelling code runs."""
    kernels: Kernels = TRANSFORMERS
    """Whose norms, rotary embeddings, gated products and losses it calls."""
    mesh: Mesh = ONE
    """Over how many ranks its operations are spread: the graph is one rank's."""

    @property
    def caches(self) -> bool:
        """Whether layers put their keys and values into a cache."""
        return self.use_cache and not self.modeling.drops_cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """Values every layer reads: rotary tables, masks (full and sliding)."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    window_mask: Tensor | None
