"""Diff pruning: a difference of every weight trains under a gate that learns to close (Guo 2020, arXiv:2012.07463,
sections 2 and 3).

Trains: two numbers for every weight of a chosen linear layer, the difference and its gate's location; with `structured`
one more gate for each layer, as the paper's groups are.
Keeps for backward: of every such weight the gate's noise-shifted sigmoid, what is clamped, the gate and the changed
weight; the layer's input.
Not modelled: the penalty on open gates, whose sigmoid is one more tensor of every weight, errs low; embeddings, norms;
magnitude pruning to the target and the training of what is left, which take less.
No library has it: the weight is `w + z d`, z a stretched binary concrete variable (Louizos 2018, arXiv:1712.01312).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Graph, Op, Tensor
from peftplan.graph.edit import Module
from peftplan.methods._branches import OnLinears, builder, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Family, Host, Remark

HARMLESS = COMMON | {"concrete_lower", "concrete_upper", "alpha_init", "sparsity_pen"}


@final
@dataclass(frozen=True)
class DiffPruning(OnLinears):
    structured: bool = True
    target_sparsity: float = 0.005
    """What is left of the differences in the end."""
    family: ClassVar[Family] = "selective"
    libraries: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str] = "diff pruning"
    no_4bit: ClassVar[str] = "it changes weights one by one, which packed ones have not"
    no_8bit: ClassVar[str] = no_4bit

    def default_targets(self, family: str) -> str:
        del family
        return "all-linear"

    def check(self) -> None:
        check_share("target_sparsity", self.target_sparsity)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, _ = builder(module, host)
        shape, dtype = module.weight.shape, host.new_dtype
        with b.marked(module.site, "extra"):
            gate = _gate(b, b.weight("diff_alpha", *shape, dtype=dtype, kind=ADAPTER), "gate")
            if self.structured:
                group = _gate(b, b.weight("diff_group_alpha", 1, dtype=dtype, kind=ADAPTER), "group")
                both = b.mul(gate, group, label="gates")
                b.hold(gate)
                gate = both
            change = b.mul(gate, b.weight("diff", *shape, dtype=dtype, kind=ADAPTER), label="change")
            weight = b.cast(b.add(module.weight, change, label="changed"), module.weight.dtype, label="weight")
        bias = next((t for op in module.ops for t in op.ins if t.is_param and len(t.shape) == 1), None)
        with b.marked(module.site, "up"):
            out = b.linear(module.x, weight, bias, label="out")
        b.hold(gate, weight, module.x)
        return ended(b, out, module, name=self.title)

    def remarks(self, graph: Graph) -> tuple[Remark, ...]:
        gated = sum(t.numel * count for t, count in graph.params() if t.name.endswith(".diff"))
        why = (
            f"{self.target_sparsity:.2%} of the gated weights, once the gates have closed; all of them train until then"
        )
        return (Remark("parameters.changed", round(self.target_sparsity * gated), why),)


def _gate(b: Builder, alpha: Tensor, label: str) -> Tensor:
    """`(sigmoid(log u - log(1 - u) + alpha) * (r - l) + l).clamp(0, 1)`, u drawn anew."""
    shape, dtype = alpha.shape, alpha.dtype
    with b.scope(label):
        u = b.plain("u", *shape, dtype=dtype)
        log = b.plain("log", *shape, dtype=dtype, ins=(u,))
        rest = b.plain("rest", *shape, dtype=dtype, ins=(u,))
        other = b.plain("log_rest", *shape, dtype=dtype, ins=(rest,))
        noise = b.plain("noise", *shape, dtype=dtype, ins=(log, other))
        s = b.squash(b.add(noise, alpha), label="sigmoid")
        stretched = b.add_const(b.scale(s), label="stretched")
        grads = (Grad(stretched, stretched.nbytes, 2 * stretched.numel),)
        z = b.formula("clamp", Tensor("", shape, dtype), stretched, keeps=(stretched,), grads=grads)
        b.hold(u, s)
    return z


METHOD = DiffPruning
EXAMPLES = (DiffPruning(), DiffPruning(structured=False, target_modules=("v_proj", "down_proj")))
UNVERIFIED: dict[str, str] = {}
