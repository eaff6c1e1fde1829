"""X-LoRA: a trained classifier mixes finished LoRAs, token by token (Buehler 2024, arXiv:2402.07148).

Trains: a linear layer from the hidden size to one number for each adapter (with `layerwise_scalings` for each adapter
of each adapted layer), with `xlora_depth` above 1 a network of width `xlora_size` before it; and the LoRAs themselves
with `use_trainable_adapters`. `adapters` says how many there are, --rank and --target-modules what each is like.
Keeps for backward: the layer's input in the adapters' dtype, the scalings of every token, layer and adapter once for
the whole model (they live on to the next step), and the last hidden state.
A step runs the model twice: without gradient for the last hidden state, then with the scalings made of it.
Not modelled: `enable_softmax=false`, `enable_softmax_topk`, `top_k_lora`, embeddings; the first pass's memory
holds the inputs of all layers, and its short-lived masks and indices are left out.
Mirrors peft/tuners/xlora/model.py _enable_peft_forward_hooks, layer.py XLoraLinearLayer.forward and classifier.py,
peft 0.21.2. It has no X-LoRA on packed weights, nor with gradient checkpointing, nor with a KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import ADAPTER, BUFFER, PARAMS, Grad, Graph, Op, Region, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import builder, check_rank, check_share
from peftplan.methods._expert_targets import converted, converts, read_choice
from peftplan.methods._linears import COMMON, adapt, ended, packed, plan
from peftplan.methods.base import Family, Host, Method
from peftplan.methods.targets import DEFAULTS, Names, targets
from peftplan.units import DType

HARMLESS = COMMON | {"softmax_temperature", "scaling_pass_value", "global_scaling_weight"}
SCALINGS, DUMMY = "@xlora_scalings", "@dummy_scalings"


@final
@dataclass(frozen=True)
class Xlora(Method):
    """PEFT's XLoraConfig, and the LoRAs that it mixes."""

    r: int = 8
    target_modules: Names = None
    adapters: int | dict[str, str] = 2
    """How many, or PEFT's paths by name; what is in the files is not read."""
    hidden_size: int | None = None
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    top_k_lora: int | None = None
    family: ClassVar[Family] = "reparameterized"
    checkpoints: ClassVar[bool] = False
    caches: ClassVar[bool] = False

    @property
    def _count(self) -> int:
        return self.adapters if isinstance(self.adapters, int) else len(self.adapters)

    def default_targets(self, family: str) -> Names:
        return DEFAULTS.get(family)

    def apply(self, graph: Graph, host: Host) -> Graph:
        self._check(host)
        family = host.arch.family
        wanted = self.default_targets(family) if self.target_modules is None else self.target_modules
        if converts(family):
            now = converted(graph, family, read_choice(family, wanted, None, None), (), self.r)
            if now.parameters:
                raise RequestError(
                    f"X-LoRA on stacked experts of {family} fails in PEFT, whose wrapper of {now.parameters[0]} hands "
                    "scalings on to the experts; name modules of the attention in --target-modules"
                )
            wanted = now.modules
        planned = plan(graph, targets(family, wanted), lambda path: path)
        layers = sum(map(len, planned.values()))
        labels = next(t for t in graph.inputs if t.name == "@labels")
        scalings = Tensor(SCALINGS, (*labels.shape, layers, self._count), _softmax_dtype(host))
        adapted = adapt(graph, planned, lambda module, _: self._branch(module, scalings, host), name="X-LoRA")
        first, *rest = adapted.regions
        before = scalings._replace(name="scalings_before")
        b = Builder(host.numerics)
        hidden = b.plain("last_hidden", *labels.shape, host.arch.hidden, dtype=host.base_dtype)
        self._classify(b, hidden, scalings)
        b.hold(before)
        first = replace(first, ops=(*b.ops, *first.ops), taken=(before,))
        kept = before._replace(name="@xlora_scalings_before", kind=BUFFER)
        return replace(
            adapted,
            regions=(first, *rest),
            buffers=(*adapted.buffers, kept),
            prelude=tuple(_without_gradient(region, scalings) for region in adapted.regions),
        )

    def _check(self, host: Host) -> None:
        check_rank(self.r)
        check_share("xlora_dropout_p", self.xlora_dropout_p)
        for name, value in (
            ("adapters", self._count),
            ("xlora_depth", self.xlora_depth),
            ("xlora_size", self.xlora_size),
        ):
            if value < 1:
                raise RequestError(f"method.{name}={value}: must be at least 1")
        if self.hidden_size not in (None, host.arch.hidden):
            raise RequestError(
                f"method.hidden_size={self.hidden_size}: this model has {host.arch.hidden}; leave it out"
            )
        if not self.enable_softmax or self.enable_softmax_topk or self.top_k_lora is not None:
            raise Unsupported("X-LoRA with other than a softmax over all adapters is not modelled; leave its knobs out")

    def _branch(self, module: Module, scalings: Tensor, host: Host) -> tuple[Op, ...]:
        """XLoraLinearLayer.forward."""
        if packed(module) is not None:
            raise RequestError("PEFT has no X-LoRA on packed weights; use an unquantized --format")
        b, total = builder(module, host)
        ops = writing(module.ops, module.out, total)
        dtype = host.new_dtype
        with b.marked(module.site, "extra"):
            mine = b.slice(scalings, *scalings.shape[:2], self._count, label="scalings")
            x = b.cast(module.x, dtype, label="xlora_x")
            held: tuple[Tensor, ...] = ()
            for i in range(self._count):
                a = b.weight(f"lora_A.{i}", self.r, module.in_features, dtype=dtype, kind=ADAPTER)
                up = b.weight(f"lora_B.{i}", module.out_features, self.r, dtype=dtype, kind=ADAPTER)
                a, up = (t._replace(trainable=self.use_trainable_adapters) for t in (a, up))
                own = b.slice(mine, *mine.shape[:2], 1, label="own")
                given = b.mul(x, own, label="scaled_x")
                b.hold(*held)
                held = (given,)
                change = b.linear(b.linear(given, a, label="lora_A"), up, label="lora_B")
                total = b.add_into(total, b.scale(b.scale(change), label="weighted"), label="sum")
            out = b.cast(total, module.x.dtype, label="out")
            b.hold(*held, x, module.x)
        return (*ops, *ended(b, out, module, name="X-LoRA"))

    def _classify(self, b: Builder, hidden: Tensor, scalings: Tensor) -> Tensor:
        """XLoraClassifier.forward."""
        *_, layers, classes = scalings.shape
        x = hidden
        for number in range(self.xlora_depth - 1):
            x = b.squash(self._linear(b, x, self.xlora_size, number))
            x = b.dropout(x, self.xlora_dropout_p)
        width = classes * layers if self.layerwise_scalings else classes
        logits = self._linear(b, x, width, self.xlora_depth - 1)
        scaled = scalings._replace(dtype=logits.dtype)
        scaled = b.formula("scaled", scaled, logits, grads=(Grad(logits, scaled.logical_bytes),))
        made = b.softmax(scaled, scalings.dtype, label=SCALINGS)
        b.hold(logits, scaled)
        return made

    def _linear(self, b: Builder, x: Tensor, width: int, number: int) -> Tensor:
        name = f"@internal_xlora_classifier.{number}"
        weight = Tensor(f"{name}.weight", (width, x.shape[-1]), x.dtype, ADAPTER, True)
        return b.linear(
            x, weight, Tensor(f"{name}.bias", (width,), x.dtype, ADAPTER, True), label=f"classifier.{number}"
        )


def _softmax_dtype(host: Host) -> DType:
    """autocast_mode.h: CUDA's autocast computes a softmax in fp32, the CPU's leaves it as it is."""
    half = host.numerics.autocast
    if half is None:
        return host.base_dtype
    return DType.float32 if host.numerics.backend == "cuda" else half


def _without_gradient(region: Region, scalings: Tensor) -> Region:
    """The region in the first pass: nothing trains, and every scaling is one number."""

    def plain(t: Tensor) -> Tensor:
        if t.kind in PARAMS:
            return t._replace(trainable=False)
        base = DUMMY if t.base == SCALINGS else t.base
        return t._replace(name=DUMMY if t.name == SCALINGS else t.name, base=base)

    ops = tuple(op.over(tuple(map(plain, op.ins)), plain(op.out)) for op in region.ops)
    if region.entry is None:
        b = Builder(Numerics())
        b.make(DUMMY[1:], *scalings.shape, dtype=scalings.dtype)
        ops = (*b.ops, *ops)
    return replace(region, ops=ops)


METHOD = Xlora
EXAMPLES = (Xlora(), Xlora(r=3, adapters=4, xlora_depth=3, xlora_size=32, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
