"""LoRA: y = Wx + (alpha/r) B(Ax), W frozen, A and B train (Hu 2021, arXiv:2106.09685, equation 3).

Trains: r (in + out) per adapted linear layer, embedding or weight, with `use_dora` out more, with `kasa_config` r
more, with MiCA's initialisation r in alone, with `use_bdlora` A or B divided by its blocks; plus `bias`, `lora_bias`,
copies of `modules_to_save` and rows of `trainable_token_indices`. With `adapters`, those of `trained_adapters`.
Keeps for backward: the input of A per module (its own fp32 copy where the adapter is fp32 on a half-precision base;
with `velora_config` a number per group of its features), the output of A (but where B is frozen), and a mask where
there is dropout; for `target_parameters` the module's input and the changed weight.
Not modelled: aLoRA, Monte-CLoRA, Arrow, DoRA on embeddings, VeLoRA under autocast.
Mirrors peft/tuners/lora/layer.py Linear.forward and peft/tuners/lora/bnb.py Linear4bit.forward, peft 0.21.2; variants
in `_dora`, `_lora` and `_velora`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import BUFFER, Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.mesh import Mesh
from peftplan.graph.ops import PackedLinear
from peftplan.methods._adapters import Counts
from peftplan.methods._branches import Chosen, OnLinears, builder, by_pattern, check_rank, check_share
from peftplan.methods._dora import dora
from peftplan.methods._expert_targets import converted, converts, read_choice
from peftplan.methods._linears import BACKENDS, lacks_bias, layer_of, packed, sees_autocast
from peftplan.methods._lora import (
    CONVERTED,
    BdLora,
    Branch,
    Variant,
    block_diagonal,
    cast_first,
    change,
    check_start,
    embedded,
    kasa,
    plain,
    pooled,
)
from peftplan.methods._parameters import OnWeights, adapt_weights
from peftplan.methods._replication import check_stacking, replicate
from peftplan.methods._saved import save_modules
from peftplan.methods._tied import EMBEDDING, saves_ends, share_copy, tied_copies, tied_targets
from peftplan.methods._tokens import train_rows
from peftplan.methods._velora import Velora
from peftplan.methods.base import Host
from peftplan.methods.targets import check_pattern

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "lora_plus": {},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "mica": {"init_lora_weights": "mica"},
    "dora": {"use_dora": True},
    "kasa": {"kasa_config": {}},
    "velora": {"velora_config": {}},
    "qlora": {},
    "qdora": {"use_dora": True},
}
"""Initialisation, scaling and learning rates, and what PEFT has as settings of LoRA; `q...` also implies a 4-bit base
(see `resolve`)."""
HARMLESS = frozenset(
    {
        "lora_alpha", "alpha_pattern", "use_rslora", "task_type", "inference_mode", "peft_type",
        "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "fan_in_fan_out",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "megatron_config",
        "megatron_core",
    }
)  # fmt: skip
_UNMODELLED = {
    "alora_invocation_tokens": "it adapts the tokens from an invocation on, and where that is lies in the data",
    "monteclora_config": "the noise that it draws for A is a chain of small operators not written down yet",
    "arrow_config": "it routes between adapters that were trained before",
}
"""Setting -> why."""
MICA = "init_lora_weights=mica"


@final
@dataclass(frozen=True)
class Lora(OnLinears):
    """PEFT's LoraConfig, the knobs that change memory."""

    r: int = 8
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    """Memory feels "mica" alone: B stays as it starts (arXiv:2604.01694)."""
    use_dora: bool = False
    """Weight-decomposed: a trained magnitude per output feature; see `_dora`."""
    kasa_config: dict[str, Any] | None = None
    """With a trained diagonal between A and B; its settings move no memory."""
    use_bdlora: BdLora | None = None
    """A or B block-diagonal."""
    alora_invocation_tokens: Any = None
    velora_config: Velora | None = None
    """With A's input compressed; see `_velora`."""
    use_qalora: bool = False
    """With its input pooled by groups, on GPTQ's layers alone."""
    qalora_group_size: int = 16
    monteclora_config: Any = None
    arrow_config: Any = None
    layer_replication: tuple[tuple[int, int], ...] | None = None
    """Layers stacked anew over shared weights; see `_replication`."""
    target_parameters: tuple[str, ...] | None = None
    """Weights adapted themselves, by the ends of their names; see `_parameters`."""
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    """Rows of the embedding, or of modules by name, that train beside the adapters; see `_tokens`."""
    ensure_weight_tying: bool = False
    """Where embedding and head are one weight: the same adapter, copy or rows for both."""
    adapters: int = 1
    """How many adapters of this shape are loaded (PEFT's add_adapter)."""
    active_adapters: int = 1
    """How many of them run (set_adapter with a list)."""
    trained_adapters: int | None = None
    """How many of those train (set_requires_grad for the rest); None: all."""
    loop_knobs: ClassVar[frozenset[str]] = frozenset({"adapters", "active_adapters", "trained_adapters"})
    title: ClassVar[str] = "LoRA"
    layers: ClassVar[frozenset[str]] = BACKENDS | {"eetq"}
    on_packed: ClassVar[bool] = True
    splits: ClassVar[bool] = True

    @property
    def _counts(self) -> Counts:
        trained = self.active_adapters if self.trained_adapters is None else self.trained_adapters
        return Counts(loaded=self.adapters, active=self.active_adapters, trained=trained)

    def apply(self, graph: Graph, host: Host) -> Graph:
        if host.mesh.tp > 1:
            self._check_split()
        if converts(host.arch.family):
            return self._converted(graph, host.arch.family)._put_on(graph, host)
        return self._put_on(graph, host)

    def _converted(self, graph: Graph, family: str) -> Lora:
        """The same with targets that name what the stacked experts of transformers 5 are."""
        choice = read_choice(family, self.target_modules, self.exclude_modules, self.modules_to_save)
        now = converted(graph, family, choice, self.target_parameters or (), self.r)
        ranks = {**self.rank_pattern, **now.ranks}
        return replace(self, target_modules=now.modules, target_parameters=now.parameters, rank_pattern=ranks)

    def _put_on(self, graph: Graph, host: Host) -> Graph:
        if self.layer_replication:
            check_stacking(graph, bias=self.bias, adapters=self.adapters)
            graph = replicate(graph, self.layer_replication, host.arch)
        if self.ensure_weight_tying and host.arch.tied:
            return self._tied()._applied(graph, host)
        return self._applied(graph, host)

    def _tied(self) -> Lora:
        """The same for embedding and head: a copy if one of them is copied, or else adapters."""
        if self.adapters > 1:
            raise Unsupported(
                "method.ensure_weight_tying with several adapters is not modelled; PEFT ties the first alone"
            )
        if saves_ends(self.modules_to_save):
            return replace(self, modules_to_save=tied_copies(self.modules_to_save))
        return replace(self, target_modules=tied_targets(self.target_modules))

    def _applied(self, graph: Graph, host: Host) -> Graph:
        out = super().apply(graph, host) if self.target_modules != () else save_modules(graph, self.modules_to_save)
        if self.target_parameters:
            self._check_on_weights()
            counts = self._counts
            on = OnWeights(self.target_parameters, self.size, counts.active, counts.trained, host)
            out = adapt_weights(out, on)
        if self.ensure_weight_tying and host.arch.tied and saves_ends(self.modules_to_save):
            out = share_copy(out)
        rows = self.trainable_token_indices
        if rows is not None:
            named = rows if isinstance(rows, dict) else {"embed_tokens": rows}
            out = train_rows(out, named, host, tie=self.ensure_weight_tying)
        return self._counts.beside(out)

    def trained_biases(self) -> str:
        return self.bias

    def size(self, path: str) -> int:
        return by_pattern(path, self.r, self.rank_pattern)

    # -- what goes together -------------------------------------------------------------------------------------

    def check(self) -> None:
        check_rank(self.r)
        for pattern, rank in self.rank_pattern.items():
            check_rank(rank, f"method.rank_pattern: {pattern}=")
            check_pattern("method.rank_pattern", pattern)
        check_share("lora_dropout", self.lora_dropout)
        self._check_bias()
        self._check_variants()
        self._counts.check(bias=self.bias, saved=bool(self.modules_to_save or self.trainable_token_indices))
        for name, why in _UNMODELLED.items():
            if getattr(self, name):
                raise Unsupported(f"method.{name} is not modelled: {why}; leave it out for plain LoRA")

    def _check_bias(self) -> None:
        if self.lora_bias and self.use_dora:
            raise RequestError("method.lora_bias=true: PEFT has no bias on DoRA's branch; leave one of the two out")
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise RequestError(
                f"method.lora_bias=true: PEFT has no bias with init_lora_weights={self.init_lora_weights}; drop one"
            )

    def _check_variants(self) -> None:
        if self.velora_config is not None:
            self.velora_config.check()
        asked = list(self._variants())
        if len(asked) > 1:
            raise RequestError(f"PEFT does not combine {' and '.join(asked)} in one LoRA; leave one out")

    def _check_split(self) -> None:
        """What PEFT cannot put on split layers: their copies and variants mix whole tensors and parts."""
        asked = [name for name in self._variants() if name != MICA]
        asked += [n for n in ("modules_to_save", "target_parameters", "trainable_token_indices") if getattr(self, n)]
        if asked:
            raise RequestError(f"method.{asked[0]}: PEFT has none on split layers; leave it out, or use --layout fsdp")

    def _check_on_weights(self) -> None:
        asked = [*self._variants(), *(name for name in ("lora_bias", "lora_dropout") if getattr(self, name))]
        if asked:
            raise RequestError(f"method.target_parameters: PEFT has no {asked[0]} on weights; leave one of them out")

    def _variants(self) -> Iterable[str]:
        """The settings that ask for a variant."""
        if self.use_dora:
            yield "use_dora"
        if self.init_lora_weights == "mica":
            yield MICA
        yield from (name for name in ("kasa_config", "use_bdlora", "velora_config") if getattr(self, name) is not None)

    # -- the branch ---------------------------------------------------------------------------------------------

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        if self.velora_config is None:
            return ()
        size = sum(self.velora_config.group(c.module.in_features) for c in chosen)
        return tuple(Tensor("@velora_embed", (size,), host.new_dtype, BUFFER) for _ in range(self.adapters))

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        """The base and its low-rank side branches, ending in the module's own output."""
        layer = layer_of(module)
        if self.use_qalora:
            self._check_pooling(module, layer)
        kernel = packed(module) if layer not in ("gptq", *CONVERTED) else None
        if host.mesh.split(module.site) != "whole" and module.site == "head":
            raise RequestError("PEFT adapts no lm_head that ranks share; leave it out of --target-modules")
        self._check_module(module, size, layer, kernel, host.mesh)
        b, base = builder(module, host)
        casts = (kernel is None and layer not in CONVERTED) or not sees_autocast(host)
        with b.marked(module.site, "down"):
            result = b.copy(base, label="clone") if kernel is not None and kernel.adapters_clone else base
            x = b.cast(module.x, host.new_dtype, label="lora_x") if casts else module.x
        for number in range(self.active_adapters):
            branch = self._sides(b, module, size, host, number)._replace(base=result, x=x, kernel=kernel)
            if layer in CONVERTED:
                result = cast_first(b, branch, layer, casts=casts)
            else:
                result = self._changed(b, branch, casts=casts)
        with b.marked(module.site, "extra"):
            out = b.cast(result, base.dtype, label="out") if casts else result
            b.hold(x, module.x)
        return (*writing(module.ops, module.out, base), *writing(b.ops, out, module.out))

    def embedding(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        asked = [name for name in self._variants() if name != MICA]
        if self.lora_bias or asked:
            what = "lora_bias" if self.lora_bias else asked[0]
            raise Unsupported(f"LoRA with {what} on embeddings is not modelled; leave embed_tokens out")
        b, base = builder(module, host)
        result = base
        scale = Tensor("@embed_scale", (), host.base_dtype, BUFFER) if host.arch.embed_scale else None
        for number in range(self.active_adapters):
            result = embedded(b, self._sides(b, module, size, host, number)._replace(base=result), scale)
        with b.marked(module.site, "extra"):
            out = b.cast(result, base.dtype, label="out")
        return (*writing(module.ops, module.out, base), *writing(b.ops, out, module.out))

    def _changed(self, b: Builder, branch: Branch, *, casts: bool) -> Tensor:
        """What one adapter makes of the result; on packed weights in the base's dtype again."""
        variant = self._variant()
        if branch.kernel is None:
            return variant(b, branch)
        if variant is not plain or branch.kernel.layer == "hqq":  # lora/hqq.py, HqqLoraLinear.forward
            total = variant(b, branch)
            return b.cast(total, branch.base.dtype, label="total") if casts else total
        scales_last = branch.kernel.layer == "eetq"  # lora/eetq.py, EetqLoraLinear.forward
        delta = change(b, branch, scaled=not scales_last)
        with b.marked(branch.module.site, "extra"):
            delta = b.cast(delta, branch.base.dtype, label="delta") if casts else delta
            delta = b.scale(delta, label="scaled") if scales_last else delta
            total = b.add(branch.base, delta, label="sum")
            b.hold(delta)
        return total

    def _variant(self) -> Variant:
        if self.use_qalora:
            return pooled
        if self.use_dora:
            return dora
        if self.velora_config is not None:
            return self.velora_config
        if self.kasa_config is not None:
            return kasa
        return plain if self.use_bdlora is None else block_diagonal

    def _sides(self, b: Builder, module: Module, rank: int, host: Host, number: int) -> Branch:
        """The weights of one adapter."""
        embeds = module.site == "embed"
        wide, out = module.weight.shape if embeds else reversed(module.weight.shape)
        tied = module.site == "head" and self.ensure_weight_tying and host.arch.tied
        rank = self.size(EMBEDDING) if tied else rank
        a_shape, up_shape = (rank, wide // self.qalora_group_size if self.use_qalora else wide), (out, rank)
        if self.use_bdlora is not None:
            a_shape = self.use_bdlora.shape(module.path, "a", *a_shape)
            up_shape = self.use_bdlora.shape(module.path, "b", *up_shape)
        blank = Branch(module=module, base=module.out, x=module.x, number=number, trains=number < self._counts.trained,
                       dropout=self.lora_dropout)  # fmt: skip
        kind = "lora_embedding" if embeds else "lora"
        a = blank.weight(b, f"{kind}_A.weight", *a_shape, dtype=host.new_dtype)
        up = blank.weight(b, f"{kind}_B.weight", *up_shape, dtype=host.new_dtype)
        if tied and host.new_dtype is module.weight.dtype:  # parameters of their own, which view the embedding's
            a, up = a._replace(stored_bytes=0), up._replace(stored_bytes=0)
        return blank._replace(
            a=a,
            up=up._replace(trainable=False) if self.init_lora_weights == "mica" else up,
            bias=blank.weight(b, "lora_B.bias", up_shape[0], dtype=host.new_dtype) if self.lora_bias else None,
        )

    def _check_pooling(self, module: Module, layer: str) -> None:
        if layer != "gptq":
            raise RequestError(
                "method.use_qalora=true: PEFT has QA-LoRA on GPTQ weights only and is silent about it elsewhere; leave "
                "it out"
            )
        if module.in_features % self.qalora_group_size:
            raise RequestError(
                f"method.qalora_group_size={self.qalora_group_size} does not divide the {module.in_features} inputs of "
                f"{module.path}; use a divisor"
            )

    def _check_module(self, module: Module, rank: int, layer: str, kernel: PackedLinear | None, mesh: Mesh) -> None:
        out, wide = mesh.whole(module.site, module.out_features, module.in_features)
        if rank > min(out, wide) and module.site != "shared_gate":
            # The shared expert's gate has one output, and PEFT's all-linear adapts it.
            raise RequestError(
                f"--rank {rank} is larger than the smaller side of {module.path} ({out}x{wide}); use at most "
                f"{min(out, wide)}"
            )
        variants = [name for name in self._variants() if name != MICA]
        if variants and layer in ("gptq", *CONVERTED):
            raise RequestError(f"PEFT has no LoRA with {variants[0]} on the layers of {layer}; leave it out")
        if layer in ("gptq", *CONVERTED):
            check_start(self.init_lora_weights, layer)
        asked = [name for name in self._variants() if name != "use_dora"]
        if kernel is not None and kernel.layer == "eetq" and self.use_dora:
            raise RequestError("PEFT has no DoRA for EETQ's layers (lora/eetq.py); use an unquantized --format")
        if self.lora_bias and (lacks_bias(module) if kernel is None else kernel.layer == "hqq"):
            raise RequestError(
                "method.lora_bias=true: PEFT has no such bias on hqq's and torchao's layers; leave it out"
            )
        if asked and kernel is not None:
            raise RequestError(f"PEFT has no LoRA with {asked[0]} on packed weights; use an unquantized --format")


METHOD = Lora
EXAMPLES = (
    Lora(),
    Lora(r=3, target_modules="all-linear", lora_dropout=0.1),
    Lora(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",)),
    Lora(r=2, target_modules=("embed_tokens", "v_proj"), adapters=3, active_adapters=2, trained_adapters=1),
)
UNVERIFIED: dict[str, str] = {}
