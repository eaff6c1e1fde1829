"""AdaLoRA: LoRA in three factors, whose ranks are cut while it trains (Zhang 2023, arXiv:2303.10512, section 3).

Trains: init_r (in + out + 1) + 1 per adapted linear layer, whatever ranks are left: PEFT masks ranks and never takes
them away, and since 0.21.0 it trains the number that the result is divided by (`trains_ranknum`) wherever it moves or
casts adapters: on a GPU, or under half-precision weights. Plus `bias` and copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, A times E, its projection, and the layer's whole change in
the adapter's dtype, for the gradient of that number; for the loss's penalty the Gram matrix of every A and B, r x r.
Beside the parameters it holds three numbers for each of A, B and E (RankAllocator: ipt, exp_avg_ipt, exp_avg_unc) from
the first `update_and_allocate` up to total_step - tfinal; PEFT leaves that call to the training loop.
Not modelled: embeddings, temporaries of that call (a few times the largest A or B).
Mirrors peft/tuners/adalora/layer.py SVDLinear.forward and RankAllocator, bnb.py, and model.py AdaLoraModel.forward,
peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.core import ADAPTER, BUFFER, Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PackedLinear
from peftplan.methods._branches import Chosen, OnLinears, builder, check_rank, check_share
from peftplan.methods._linears import COMMON, ended, layer_of, packed, sees_autocast
from peftplan.methods._orthogonal import penalised
from peftplan.methods.base import Host
from peftplan.methods.targets import DEFAULTS
from peftplan.units import DType

HARMLESS = COMMON | {
    "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "beta1", "beta2", "deltaT", "orth_reg_weight",
    "rank_pattern", "lora_bias", "megatron_config", "megatron_core", "runtime_config", "corda_config", "eva_config",
    "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip


@final
@dataclass(frozen=True)
class Adalora(OnLinears):
    """PEFT's AdaLoraConfig."""

    init_r: int = 12
    target_r: int = 8
    total_step: int | None = None
    tinit: int = 0
    tfinal: int = 0
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = False
    loftq_config: Any = None
    update_and_allocate: bool = True
    """Whether the training loop calls it, as PEFT says it should."""
    trains_ranknum: bool = True
    """Whether what the result is divided by trains: false for PEFT before 0.21.0."""
    loop_knobs: ClassVar[frozenset[str]] = frozenset({"update_and_allocate", "trains_ranknum"})
    title: ClassVar[str] = "AdaLoRA"
    layers: ClassVar[frozenset[str]] = frozenset({"gptq"})
    packs: ClassVar[bool] = True
    on_packed: ClassVar[bool] = True
    defaults: ClassVar[dict[str, tuple[str, ...]]] = {
        k: v for k, v in DEFAULTS.items() if k not in ("mistral", "mixtral")
    }

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.init_r, "method.init_r")
        check_share("lora_dropout", self.lora_dropout)
        for refused in ("use_dora", "loftq_config"):
            if self.knob(refused):
                raise RequestError(f"method.{refused}: PEFT's AdaLoRA does not support it; leave it out")
        if self.total_step is None or self.total_step < 1:
            raise RequestError(f"method.total_step={self.total_step}: PEFT needs the number of training steps, above 0")
        if self.tinit >= self.total_step - self.tfinal:
            raise RequestError(
                f"method.tinit={self.tinit}, tfinal={self.tfinal}: together they must be less than "
                f"method.total_step={self.total_step}"
            )
        if self.update_and_allocate and not 0 <= self.target_r < self.init_r:
            raise RequestError(
                f"method.target_r={self.target_r}: PEFT cuts ranks only from method.init_r={self.init_r} to fewer"
            )

    def apply(self, graph: Graph, host: Host) -> Graph:
        adapted = super().apply(graph, host)
        return replace(adapted, regions=tuple(penalised(region, host) for region in adapted.regions))

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        if not self.update_and_allocate:
            return ()
        return tuple(
            Tensor(f"@{c.module.path}.{kind}.{side}.{i}", (self.init_r, width), host.new_dtype, BUFFER)
            for i, c in enumerate(chosen)
            for side, width in (("A", c.module.in_features), ("B", c.module.out_features), ("E", 1))
            for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc")
        )

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        if layer_of(module) == "gptq":
            raise Unsupported("AdaLoRA on GPTQ's layers, whose output PEFT adds to in place, is not modelled; use lora")
        b, base = builder(module, host)
        dtype, r = host.new_dtype, self.init_r
        a = b.weight("lora_A", r, module.in_features, dtype=dtype, kind=ADAPTER)
        up = b.weight("lora_B", module.out_features, r, dtype=dtype, kind=ADAPTER)
        values = b.weight("lora_E", r, 1, dtype=dtype, kind=ADAPTER)
        rank = b.weight("ranknum", 1, dtype=dtype, kind=ADAPTER)._replace(trainable=self.trains_ranknum)
        kernel = packed(module)
        casts = _cast_to(kernel, host)
        with b.marked(module.site, "down"):
            b.hold(a, up, values)  # in the order they are registered in
            result = b.copy(base, label="clone") if kernel is not None and kernel.adapters_clone else base
            ranknum = b.add_const(rank, label="ranknum_eps")
            x = module.x if casts is None else b.cast(module.x, casts, label="lora_x")
            given = b.dropout(x, self.lora_dropout)
            down = b.linear(given, b.mul(a, values, label="lora_AE"), label="down")
        with b.marked(module.site, "up"):
            change = b.linear(down, b.alias(up), label="up")
        with b.marked(module.site, "extra"):
            if kernel is not None and casts is not None:
                change = b.cast(change, base.dtype, label="delta")
            part = b.div(b.scale(change), ranknum, label="divided")
            b.hold(*([] if kernel is None else [change]))
            in_place = kernel is None or kernel.adapters_clone
            out = b.add_into(result, part, label="sum") if in_place else b.add(result, part, label="sum")
            b.hold(part, ranknum, x, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))


def _cast_to(kernel: PackedLinear | None, host: Host) -> DType | None:
    """What the layer's input is cast to: fp32 before bitsandbytes' 8 bit, whatever the adapter's dtype is."""
    if kernel is None or kernel.adapters_clone:
        return None if kernel is not None and sees_autocast(host) else host.new_dtype
    if host.new_dtype is not DType.float32 and host.numerics.autocast is None:
        raise Unsupported("PEFT's AdaLoRA gives 8-bit layers fp32; use --adapter-dtype fp32")
    return None if sees_autocast(host) else DType.float32


METHOD = Adalora
EXAMPLES = (
    Adalora(total_step=1000),
    Adalora(init_r=4, target_r=2, total_step=100, tinit=10, lora_dropout=0.1, target_modules="all-linear"),
)
UNVERIFIED: dict[str, str] = {}
