"""Polytropon: every task mixes the LoRAs of several skills by weights of its own (Ponti 2022, arXiv:2202.13914).

With n_splits above 1 it mixes them part by part (Caccia 2023, arXiv:2211.03831).

Trains: n_skills (r (in + out) + n_tasks n_splits) per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, its projection, and the A and B mixed for each sample,
B (in + out) r numbers for a batch of B.
Not modelled: embeddings. Gradient checkpointing fails in PEFT: its task ids are gone when a layer runs again.
Mirrors peft/tuners/poly/layer.py Linear.forward and router.py PolyRouter.forward, peft 0.21.2, and
torch/distributions/relaxed_bernoulli.py rsample, torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, INPUT, Grad, Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder, check_rank
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"init_weights"}


@final
@dataclass(frozen=True)
class Poly(OnLinears):
    """PEFT's PolyConfig."""

    r: int = 8
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    poly_type: Literal["poly"] = "poly"
    title: ClassVar[str] = "Poly"
    packs: ClassVar[bool] = True
    on_packed: ClassVar[bool] = True
    checkpoints: ClassVar[bool] = False
    lacks: ClassVar[tuple[str, ...]] = ("layers_to_transform",)

    def check(self) -> None:
        check_rank(self.r)
        for name in ("n_tasks", "n_skills", "n_splits"):
            if self.knob(name) < 1:
                raise RequestError(f"method.{name}={self.knob(name)}: must be at least 1")

    def apply(self, graph: Graph, host: Host) -> Graph:
        adapted = super().apply(graph, host)
        return replace(adapted, inputs=(*adapted.inputs, _tasks(adapted)))

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        wide, out, parts = module.in_features, module.out_features, self.n_splits
        if wide % parts or out % parts:
            raise RequestError(f"method.n_splits={parts} does not divide both sides of {module.path}; use a divisor")
        b, base = builder(module, host)
        dtype, samples = host.new_dtype, module.x.shape[0]
        a = b.weight("poly_lora_A", parts, self.n_skills, wide // parts, self.r, dtype=dtype, kind=ADAPTER)
        up = b.weight("poly_lora_B", parts, self.n_skills, self.r, out // parts, dtype=dtype, kind=ADAPTER)
        logits = b.weight("poly_router.module_logits", self.n_tasks, parts * self.n_skills, dtype=dtype, kind=ADAPTER)
        with b.marked(module.site, "down"):
            b.hold(a, up)  # in the order they are registered in
            shares = self._shares(b, logits, samples)
            a = self._mixed(b, shares, a, samples, wide, label="mixed_A")
            up = self._mixed(b, shares, up, samples, out, label="mixed_B")
            x = b.cast(module.x, a.dtype, label="poly_x")
            tokens = module.x.shape[1]
            down = b.matmul(x, a, samples, tokens, self.r, inner=wide, label="down")
        with b.marked(module.site, "up"):
            change = b.scale(b.matmul(down, up, samples, tokens, out, inner=self.r, label="up"))
        with b.marked(module.site, "extra"):
            total = b.add_into(base, change, label="sum")
            result = b.cast(total, module.x.dtype, label="out")
            b.hold(shares, a, up, x, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, result, module, name=self.title))

    def _shares(self, b: Builder, weight: Tensor, samples: int) -> Tensor:
        """PolyRouter.forward: each sample's share of every skill, drawn around its task's logits."""
        shape = (samples, self.n_splits, self.n_skills)
        tasks = Tensor("@task_ids", (samples,), DType.int64, INPUT)
        full = Grad(weight, weight.logical_bytes, weight.logical_bytes)
        logits = Tensor("", shape, weight.dtype)
        logits = b.formula("logits", logits, weight, tasks, keeps=(tasks,), grads=(full,))
        chances = _clamp(b, b.squash(logits, label="chances"))
        noise = b.plain("noise", *shape, dtype=weight.dtype)
        drawn = b.minus(b.add(noise, _log(b, chances)), _log1p(b, _minus(b, chances)), label="drawn")
        scaled = b.scale(drawn, label="temperature")
        b.hold(noise, chances)
        picked = _clamp(b, b.squash(scaled, label="picked"))
        b.hold(logits, scaled)
        total = Tensor("", (samples, self.n_splits, 1), picked.dtype)
        total = b.formula("total", total, picked, grads=(Grad(picked, 0),))
        return b.div(picked, b.add_const(total, label="total_eps"), label="shares")

    def _mixed(self, b: Builder, shares: Tensor, weight: Tensor, samples: int, side: int, *, label: str) -> Tensor:
        """einsum, a product for each part (elementwise with one skill), and its reshape for each sample."""
        parts, is_up = self.n_splits, label.endswith("B")
        flat = weight.view(parts, self.n_skills, weight.numel // (parts * self.n_skills))
        shape = (samples, self.r, side) if is_up else (samples, side, self.r)
        if self.n_skills == 1:
            mixed = b.kron(shares, flat, samples, side * self.r, label=label).view(*shape)
        else:
            mixed = b.matmul(shares, flat, *shape, inner=self.n_skills, label=label)
        if parts == 1 or (not is_up and (samples == 1 or self.n_skills == 1)):
            return mixed
        return b.copy(mixed, label=f"{label}_rows", grad_copied=is_up)


def _tasks(graph: Graph) -> Tensor:
    """The batch's task ids."""
    size = next(t.shape[0] for t in graph.inputs if t.name == "@labels")
    return Tensor("@task_ids", (size,), DType.int64, INPUT)


def _clamp(b: Builder, x: Tensor) -> Tensor:
    """clamp_probs: where(min <= x <= max, grad, 0), two masks of booleans before the gradient."""
    masks = 4 + 2 * x.numel
    return b.formula("clamp", x._replace(base=""), x, keeps=(x,), grads=(Grad(x, x.logical_bytes, masks),))


def _log(b: Builder, x: Tensor) -> Tensor:
    return b.formula("log", x._replace(base=""), x, keeps=(x,), grads=(Grad(x, x.logical_bytes),))


def _log1p(b: Builder, x: Tensor) -> Tensor:
    """grad / (x + 1)."""
    full = x.logical_bytes
    return b.formula("log1p", x._replace(base=""), x, keeps=(x,), grads=(Grad(x, full, full),))


def _minus(b: Builder, x: Tensor) -> Tensor:
    return b.scale(x, label="negative")


METHOD = Poly
EXAMPLES = (Poly(), Poly(r=4, n_tasks=5, n_skills=3, n_splits=2, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
