"""AdapterHub's LoRA and IA3: a branch on chosen linear layers, which it puts layers of its own in place of.

Mirrors adapters/methods/lora.py LoRALinear, adapters 1.3.0, and where its interfaces say that those layers are
(models/llama/mixin_llama.py, models/mistral/mixin_mistral.py, wrappers/interfaces.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import Graph, Op, Region, Tensor
from peftplan.graph.edit import Module, Rewriter, rewrite, split_runs, writing
from peftplan.methods._adapterhub import AdapterHub, check_left_out, gate, hooked
from peftplan.methods.base import Host
from peftplan.units import DType


@dataclass(frozen=True)
class HubLinears(AdapterHub, ABC):
    """What its LoRAConfig and IA3Config have in common."""

    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    attn_matrices: tuple[str, ...] = ("q", "v")
    leave_out: tuple[int, ...] = ()
    use_gating: bool = False

    def check(self, host: Host) -> None:
        """Raises RequestError for what trains nothing."""
        check_left_out(self.leave_out, host)
        if not self._sites(host):
            raise RequestError(
                "method.selfattn_lora, intermediate_lora and output_lora leave nothing to train; set one of them, and "
                "attn_matrices to some of q, k, v"
            )

    def adapt(self, graph: Graph, host: Host, dtype: DType) -> Graph:
        self.check(host)
        sites = self._sites(host)

        def region(r: Region) -> Region:
            if r.first_index is None or r.first_index in self.leave_out:
                return r

            def branch(module: Module) -> tuple[Op, ...]:
                return self._put(module, host, dtype)

            def choose(module: Module) -> Rewriter | None:
                return branch if module.site in sites else None

            return rewrite(r, choose)

        split = split_runs(graph, lambda index: index in self.leave_out)
        return replace(split, regions=tuple(map(region, split.regions)))

    def _sites(self, host: Host) -> frozenset[str]:
        """The projections that have one. Llama's own classes take the feed-forward's way down for `intermediate`."""
        intermediate, output = ("up", "down") if hooked(host) else ("down", "up")
        attention = {"q", "k", "v"} & {*self.attn_matrices} if self.selfattn_lora else set[str]()
        below = {site for knob, site in (("intermediate_lora", intermediate), ("output_lora", output))
                 if self.knob(knob)}  # fmt: skip
        return frozenset(attention | below)

    def _put(self, module: Module, host: Host, dtype: DType) -> tuple[Op, ...]:
        """LoRALinear.forward."""
        b = Builder(host.numerics, f"{module.path}.")
        base = module.out._replace(name=f"{module.out.name}.base")
        change = self.change(b, module, dtype)
        with b.marked(module.site, "extra"):
            if self.use_gating:
                change = b.mul(change, gate(b, module.x, dtype), label="gated")
            else:
                change = b.scale(change, label="times_scaling")
            total = self.composed(b, base, b.scale(change, label="times_one"))
            b.hold(base, change, module.x)
        if total.dtype is not module.out.dtype:
            raise Unsupported(
                f"adapters' {self.base_config} makes the output of {module.path} {total.dtype.label} in place of "
                f"{module.out.dtype.label} under autocast, which is not modelled; use --precision fp32"
            )
        return (*writing(module.ops, module.out, base), *writing(b.ops, total, module.out))

    @abstractmethod
    def change(self, b: Builder, module: Module, dtype: DType) -> Tensor:
        """What goes into the layer's output, before it is scaled."""

    @abstractmethod
    def composed(self, b: Builder, base: Tensor, change: Tensor) -> Tensor:
        """`com`: the layer's output with that in it."""
