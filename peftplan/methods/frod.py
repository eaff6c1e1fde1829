"""FRoD: a weight is made of one basis for all layers, its own rotation, and a sparse trained core (PEFT 0.21.2's own).

Trains: sparse_rate in^2 + in numbers per adapted linear layer; plus `bias` and copies of `modules_to_save`.
Keeps for backward: the input times the basis, in the model's dtype, the core as a whole in x in matrix (in half
precision), and its numbers' places. On a GPU also what is copied there in every forward: basis and places.
Not modelled: sparse_rate=0, embeddings, packed bases (PEFT fails on them).
Mirrors peft/tuners/frod/layer.py Linear.forward and _get_frod_tensors, and model.py, peft 0.21.2. Basis (in x in, one
for each kind of layer) and places stay on the CPU: host memory, where the model is on a GPU. The rotations (out x in)
are buffers that move with the adapted model, which training loops do (measured: between the steps of PEFT's own
comparison they are on the GPU). The base layer is called under dropout only; with `runtime_offload_base_weight` its
weight is on the host too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Need, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, bias_of, builder, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"projection_prng_key", "save_projection", "regularization_alpha", "progressbar", "init_weights"}
INT64 = DType.int64


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class SparseProduct(Op):
    """torch.sparse.mm of a sparse matrix: ins = (places, its values, z); keeps all three.

    Backward: a whole gradient of the matrix, of which the places are taken, and the transposed matrix times the rest.
    torch counts both of these as dense products, and the forward not at all.
    """

    multiplies_back = True

    def grad_flops(self, need: Need) -> int:
        whole = 2 * self.out.numel * self.out.shape[-1]
        return whole * sum(t.name in need for t in self.ins[1:])

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.ins if any(t.name in need for t in self.ins) else ()

    def scratch_bytes(self) -> int:
        return self.out.nbytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        places, values, z = self.ins
        whole = self.out.shape[-1] ** 2 * self.out.dtype.size + places.nbytes
        grads = (Grad(values, values.nbytes, whole), Grad(z, z.nbytes, places.nbytes + values.nbytes))
        return tuple(g for g in grads if g.to.name in need)


@final
@dataclass(frozen=True)
class Frod(OnLinears):
    """PEFT's FrodConfig."""

    sparse_rate: float = 0.01
    frod_dropout: float = 0.0
    runtime_offload_base_weight: bool = False
    bias: Literal["none", "all", "frod_only"] = "none"
    title: ClassVar[str] = "FRoD"
    reads_weight: ClassVar[bool] = True
    returns_input: ClassVar[bool] = True
    no_4bit: ClassVar[str] = "PEFT makes parameters of the weight's dtype, and integers cannot train"
    no_8bit: ClassVar[str] = no_4bit
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_share("frod_dropout", self.frod_dropout)
        if not 0 < self.sparse_rate <= 1:
            raise RequestError(f"method.sparse_rate={self.sparse_rate}: must be above 0, and at most 1")

    def _count(self, wide: int) -> int:
        """How many elements off the core's diagonal train."""
        return max(1, min(int(wide * wide * self.sparse_rate), wide * wide - wide))

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        rotations = Tensor("@frod_U", (sum(c.module.weight.numel for c in chosen),), host.base_dtype, BUFFER)
        if host.numerics.backend != "cpu":
            return (rotations,)
        kinds = {c.module.path: c.module.in_features for c in chosen}
        return (
            Tensor("@frod_V", (sum(n * n for n in kinds.values()),), host.base_dtype, BUFFER),
            rotations,
            Tensor("@frod_s_indices", (sum(2 * self._count(n) + 2 for n in kinds.values()),), INT64, BUFFER),
        )

    def unread(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        if self.frod_dropout:
            return ()
        away = self.runtime_offload_base_weight and host.numerics.backend != "cpu"
        weights = (c.module.weight._replace(trainable=False) for c in chosen)
        return tuple(w._replace(stored_bytes=0) if away else w for w in weights)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        x, wide, out = module.x, module.in_features, module.out_features
        with b.marked(module.site, "down"):
            diagonal = b.weight("frod_lambda_l", wide, dtype=host.new_dtype, kind=ADAPTER)
            numbers = b.weight("frod_lambda_s_values", self._count(wide), dtype=host.new_dtype, kind=ADAPTER)
            b.hold(diagonal, numbers)  # in the order they are registered in
            rotation, basis = self._copied(b, "U", (out, wide), host, x), self._copied(b, "V", (wide, wide), host, x)
            places, values, diagonal = self._core(b, numbers, diagonal, x.dtype)
            given = b.dropout(x, self.frod_dropout)
            z = b.matmul(given.view(x.numel // wide, wide), basis, x.numel // wide, wide, inner=wide, label="z")
            sparse = _sparse(b, places, values, z)
            straight = b.mul(z, diagonal, label="z_L")
        with b.marked(module.site, "up"):
            change = b.linear(b.add(sparse, straight, label="z_sum"), rotation, label="frod").view(*base.shape)
        with b.marked(module.site, "extra"):
            total, held = self._joined(b, module, base, change, given)
            result = b.cast(total, x.dtype, label="out")
            b.hold(rotation, basis, places, values, diagonal, given, z, sparse, straight, change, *held, x)
        own = writing(module.ops, module.out, base) if self.frod_dropout else ()
        return (*own, *ended(b, result, module, name=self.title))

    def _copied(self, b: Builder, name: str, shape: tuple[int, int], host: Host, x: Tensor) -> Tensor:
        """A factor where the input is: itself, or of the basis a copy on a GPU."""
        if b.numerics.backend != "cpu" and name == "V":
            return b.plain(f"frod_{name}", *shape, dtype=x.dtype)
        return b.cast(Tensor(f"@frod_{name}", shape, host.base_dtype, BUFFER), x.dtype, label=f"frod_{name}")

    def _core(self, b: Builder, numbers: Tensor, diagonal: Tensor, dtype: DType) -> tuple[Tensor, Tensor, Tensor]:
        """sparse_coo_tensor(...).coalesce(): places and values, both new; and the diagonal."""
        count = numbers.shape[0]
        copied = () if b.numerics.backend == "cpu" else (b.plain("s_indices", 2, count, dtype=INT64),)
        given = b.cast(numbers, dtype, label="s_values")
        diagonal = b.cast(diagonal, dtype, label="lambda_l")
        places = b.plain("s_places", 2, count, dtype=INT64, ins=copied)
        out = Tensor("", (count,), dtype)
        grads = (Grad(given, given.logical_bytes, places.nbytes),)
        values = b.formula("coalesced", out, given, keeps=(*copied, given), grads=grads)
        return places, values, diagonal

    def _joined(
        self, b: Builder, module: Module, base: Tensor, change: Tensor, given: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer's output, and the locals besides: under dropout the base's, less what it makes of what was kept."""
        bias = bias_of(module)
        if not self.frod_dropout:
            return change if bias is None else b.add(change, bias, label="with_bias"), ()
        straight = base if bias is None else b.minus(base, bias, label="base_out")
        weight = b.cast(module.weight, given.dtype, label="base_weight")
        dropped = b.linear(given, weight, label="base_dropped")
        total = b.minus(b.add(base, change, label="sum"), dropped, label="rest")
        return total, (base, straight, weight, dropped)


def _sparse(b: Builder, places: Tensor, values: Tensor, z: Tensor) -> Tensor:
    """_sparse_activation_mm: dense in half precision."""
    tokens, wide = z.shape
    if z.dtype.is_half:
        whole = Tensor("", (wide, wide), values.dtype)
        grads = (Grad(values, values.logical_bytes, places.nbytes),)
        whole = b.formula("dense", whole, places, values, keeps=(places, values), grads=grads)
        return b.matmul(z, whole, tokens, wide, inner=wide, label="z_S")
    name = b.name("z_S")
    out = Tensor(name, z.shape, z.dtype)
    b.ops.append(SparseProduct(name=name, ins=(places, values, z), out=out, part="down"))
    return out


METHOD = Frod
EXAMPLES = (Frod(), Frod(sparse_rate=0.05, frod_dropout=0.1, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
