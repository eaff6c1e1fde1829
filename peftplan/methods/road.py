"""RoAd: pairs of a layer's outputs are turned and scaled (Liao 2024, arXiv:2409.00119).

Trains: out (road_1), 2 out (road_2) or 4 out (road_4) per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's output and its turned half, both in the adapter's dtype.
Not modelled: embeddings.
Mirrors peft/tuners/road/layer.py Linear.forward, _apply_road and _prepare_cols, bnb.py Linear4bit and
Linear8bitLt.forward, which do not cast their result back, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder
from peftplan.methods._linears import COMMON, ended, packed, sees_autocast
from peftplan.methods.base import Host

HARMLESS = COMMON | {"init_weights"}


@final
@dataclass(frozen=True)
class Road(OnLinears):
    """PEFT's RoadConfig."""

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64
    title: ClassVar[str] = "RoAd"
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform")

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        if self.group_size < 2 or self.group_size % 2 or module.out_features % self.group_size:
            raise RequestError(
                f"method.group_size={self.group_size}: must be even and divide the output of {module.path} "
                f"({module.out_features})"
            )
        b, base = builder(module, host)
        plain = packed(module) is None
        with b.marked(module.site, "extra"):
            y = b.cast(base, host.new_dtype, label="road_y") if plain or not sees_autocast(host) else base
            first, second = self._columns(b, module.out_features, host)
            turned = b.rotate_half(y, label="turned")
            summed = b.add(b.mul(y, first, label="straight"), b.mul(turned, second, label="crossed"), label="sum")
            b.hold(y, first, second, turned)
            out = b.cast(summed, base.dtype, label="out") if plain else summed
            b.hold(module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _columns(self, b: Builder, width: int, host: Host) -> tuple[Tensor, Tensor]:
        """_prepare_cols: scale times cosine, scale times sine, one number each per output."""
        count = {"road_1": width // 2, "road_2": width, "road_4": 2 * width}[self.variant]
        theta = b.weight("road_theta", count, dtype=host.new_dtype, kind=ADAPTER)
        alpha = b.weight("road_alpha", count, dtype=host.new_dtype, kind=ADAPTER)
        b.hold(theta, alpha)  # in the order they are registered in
        if self.variant == "road_4":
            return self._four(b, theta, alpha, width)
        if self.variant == "road_1":
            theta = b.copy(theta, width, label="thetas", grad_copied=True)
            alpha = b.copy(alpha, width, label="alphas", grad_copied=True)
        else:
            theta, alpha = b.alias(theta), b.alias(alpha)
        cos, sin = _wave(b, theta, 2, "cos"), _wave(b, theta, 1, "sin")
        columns = b.mul(alpha, cos, label="first"), b.mul(alpha, sin, label="second")
        b.hold(theta, alpha, cos, sin)
        return columns

    def _four(self, b: Builder, theta: Tensor, alpha: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Every other group of the parameters for either column."""
        theta, alpha = b.alias(theta), b.alias(alpha)
        several = width > self.group_size
        cos, sin = (
            _wave(b, b.slice(theta, width, label="theta"), temporaries, label)
            for label, temporaries in (("cos", 2), ("sin", 1))
        )
        alphas = tuple(b.slice(alpha, width, label="alpha") for _ in range(2))
        alphas = tuple(b.copy(t, label="alpha_flat") if several else t for t in alphas)
        columns = b.mul(alphas[0], cos, label="first"), b.mul(alphas[1], sin, label="second")
        b.hold(cos, sin, *alphas)
        return columns


def _wave(b: Builder, x: Tensor, temporaries: int, label: str) -> Tensor:
    """cos or sin: keeps its input; the gradient is times -sin or cos of it (derivatives.yaml)."""
    out = Tensor("", x.shape, x.dtype)
    return b.formula(label, out, x, keeps=(x,), grads=(Grad(x, x.logical_bytes, temporaries * x.logical_bytes),))


METHOD = Road
EXAMPLES = (Road(group_size=8), Road(variant="road_4", group_size=4, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
