"""LoRA: y = Wx + (alpha/r) B(Ax), W frozen, A and B train (Hu 2021, arXiv:2106.09685, equation 3).

Trains: r (in + out) per adapted linear layer, with `use_dora` out more; plus `bias`, `lora_bias` and copies of
`modules_to_save`.
Keeps for backward: the input of A per module (its own fp32 copy where the adapter is fp32 on a half-precision base),
the output of A, and a mask where there is dropout.
Not modelled: aLoRA, VeLoRA, KaSA, BD-LoRA, QA-LoRA, Monte-CLoRA, Arrow, `layer_replication`,
`target_parameters`, `trainable_token_indices`, adapters on embeddings.
Mirrors peft/tuners/lora/layer.py Linear.forward and peft/tuners/lora/bnb.py Linear4bit.forward, peft 0.21.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Graph, Op, Region, Tensor
from peftplan.graph.edit import Module, rewrite, split_runs, train, writing
from peftplan.methods._dora import Branch, dora
from peftplan.methods._linears import packed, sees_autocast
from peftplan.methods._saved import save_modules
from peftplan.methods.base import Family, Host, Method
from peftplan.methods.targets import DEFAULTS, Names, check_pattern, chosen_paths, full_path, targets

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "lora_plus": {},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "dora": {"use_dora": True},
    "qlora": {},
    "qdora": {"use_dora": True},
}
"""Initialisation, scaling and learning rates only, and DoRA; `q...` also implies a 4-bit base (see `resolve`)."""
HARMLESS = frozenset(
    {
        "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "task_type", "inference_mode", "peft_type",
        "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "fan_in_fan_out",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "megatron_config",
        "megatron_core", "ensure_weight_tying", "qalora_group_size",
    }
)  # fmt: skip
_UNMODELLED = (
    "alora_invocation_tokens", "velora_config", "kasa_config", "use_bdlora", "use_qalora",
    "monteclora_config", "arrow_config", "layer_replication", "target_parameters", "trainable_token_indices",
)  # fmt: skip


@final
@dataclass(frozen=True)
class Lora(Method):
    """PEFT's LoraConfig, the knobs that change memory."""

    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: Names = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    use_dora: bool = False
    """Weight-decomposed: a trained magnitude per output feature; see `_dora`."""
    alora_invocation_tokens: Any = None
    velora_config: Any = None
    kasa_config: Any = None
    use_bdlora: Any = None
    use_qalora: bool = False
    monteclora_config: Any = None
    arrow_config: Any = None
    layer_replication: Any = None
    target_parameters: Any = None
    trainable_token_indices: Any = None
    family: ClassVar[Family] = "reparameterized"

    def default_targets(self, family: str) -> Names:
        return DEFAULTS.get(family)

    def apply(self, graph: Graph, host: Host) -> Graph:
        self._check()
        frozen = train(graph, _is_bias) if self.bias == "all" else graph
        family = host.arch.family
        choice = targets(
            family,
            self.default_targets(family) if self.target_modules is None else self.target_modules,
            excluded=self.exclude_modules,
            layers=self.layers_to_transform,
            pattern=self.layers_pattern,
            saved=self.modules_to_save,
        )
        paths = chosen_paths(frozen, choice)
        ranks = self._ranks(frozen, paths)
        split = split_runs(frozen, lambda index: ranks[index])
        adapted = tuple(self._adapt(r, ranks[r.name if r.first_index is None else r.first_index], host)
                        for r in split.regions)  # fmt: skip
        out = replace(split, regions=adapted)
        if self.bias == "lora_only":
            out = train(out, lambda region, w: w.trainable or self._is_adapted_bias(region, w, ranks))
        return save_modules(out, self.modules_to_save)

    def _check(self) -> None:
        if self.use_dora and self.lora_bias:
            raise RequestError("method.lora_bias=true: PEFT has no bias on DoRA's branch; leave one of the two out")
        if self.r < 1:
            raise RequestError(f"--rank {self.r}: the rank must be at least 1")
        for pattern, rank in self.rank_pattern.items():
            if rank < 1:
                raise RequestError(f"method.rank_pattern: {pattern}={rank}: the rank must be at least 1")
            check_pattern("method.rank_pattern", pattern)
        if not 0 <= self.lora_dropout < 1:
            raise RequestError(f"method.lora_dropout={self.lora_dropout}: must be at least 0 and below 1")
        for name in _UNMODELLED:
            if getattr(self, name):
                raise Unsupported(f"method.{name} is not modelled yet; leave it out for plain LoRA")

    # -- which weights ------------------------------------------------------------------------------------------

    @staticmethod
    def _is_adapted_bias(region: Region, weight: Tensor, ranks: dict[int | str, tuple[tuple[str, int], ...]]) -> bool:
        if not weight.name.endswith(".bias"):
            return False
        adapted = ranks[region.name if region.first_index is None else region.first_index]
        return any(weight.name.removeprefix("@") == f"{path}.bias" for path, _ in adapted)

    def _ranks(
        self, graph: Graph, paths: dict[int | str, frozenset[str]]
    ) -> dict[int | str, tuple[tuple[str, int], ...]]:
        """Per layer (or region outside the layers): (module path, rank), PEFT's rank_pattern applied."""
        by_name = {r.name: r for r in graph.regions}
        result: dict[int | str, tuple[tuple[str, int], ...]] = {}
        memo: dict[frozenset[str], tuple[tuple[str, int], ...]] = {}
        for key, chosen in paths.items():
            if not self.rank_pattern:
                if chosen not in memo:
                    memo[chosen] = tuple((p, self.r) for p in sorted(chosen))
                result[key] = memo[chosen]
                continue
            region = by_name["layers"] if isinstance(key, int) else by_name[key]
            index = key if isinstance(key, int) else 0
            result[key] = tuple((p, self._rank_of(full_path(region, p, index))) for p in sorted(chosen))
        return result

    def _rank_of(self, path: str) -> int:
        """peft.utils.other.get_pattern_key: the first pattern that matches the end of the module's name."""
        for pattern, rank in self.rank_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return rank
        return self.r

    # -- the branch ---------------------------------------------------------------------------------------------

    def _adapt(self, region: Region, ranks: tuple[tuple[str, int], ...], host: Host) -> Region:
        wanted = dict(ranks)
        if not wanted:
            return region

        def choose(module: Module) -> Any:
            if module.path not in wanted:
                return None
            if module.site == "embed":
                raise Unsupported("LoRA on embeddings is not modelled yet; leave embed_tokens out of --target-modules")
            rank = wanted[module.path]
            small = min(module.in_features, module.out_features)
            if rank > small:
                raise RequestError(
                    f"--rank {rank} is larger than the smaller side of {module.path} "
                    f"({module.out_features}x{module.in_features}); use at most {small}"
                )
            return lambda m: self.branch(m, rank, host)

        return rewrite(region, choose)

    def branch(self, module: Module, rank: int, host: Host) -> tuple[Op, ...]:
        """The base and its low-rank side branch, ending in the module's own output."""
        at = "@" if module.weight.name.startswith("@") else ""
        b = Builder(host.numerics, f"{at}{module.path}.")
        base = module.out._replace(name=f"{module.out.name}.base")
        ops = writing(module.ops, module.out, base)
        dtype = host.new_dtype
        a = b.weight("lora_A.weight", rank, module.in_features, dtype=dtype, kind=ADAPTER)
        up = b.weight("lora_B.weight", module.out_features, rank, dtype=dtype, kind=ADAPTER)
        bias = b.weight("lora_B.bias", module.out_features, dtype=dtype, kind=ADAPTER) if self.lora_bias else None
        kernel = packed(module)
        casts = kernel is None or not sees_autocast(host)
        with b.marked(module.site, "down"):
            result = b.copy(base, label="clone") if kernel is not None and kernel.adapters_clone else base
            x = b.cast(module.x, dtype, label="lora_x") if casts else module.x
        if self.use_dora:
            sides = Branch(module=module, base=result, a=a, up=up, dropout=self.lora_dropout)
            total = dora(b, sides, x)
            out = b.cast(total, base.dtype, label="out") if casts else total
            return (*ops, *writing(b.ops, out, module.out))
        with b.marked(module.site, "down"):
            down = b.linear(b.dropout(x, self.lora_dropout), a, label="lora_A")
        with b.marked(module.site, "up"):
            delta = b.scale(b.linear(down, up, bias, label="lora_B"))
        with b.marked(module.site, "extra"):
            if kernel is not None:
                delta = b.cast(delta, base.dtype, label="delta") if casts else delta
                out = b.add(result, delta, label="sum")
                b.hold(delta, x, module.x)
            else:
                total = b.add(base, delta, label="sum")
                out = b.cast(total, base.dtype, label="out")
                b.hold(x, module.x)
        return (*ops, *writing(b.ops, out, module.out))


def _is_bias(region: Region, weight: Tensor) -> bool:
    del region
    return weight.name.endswith(".bias")


METHOD = Lora
EXAMPLES = (
    Lora(),
    Lora(r=3, target_modules="all-linear", lora_dropout=0.1),
    Lora(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",)),
)
UNVERIFIED: dict[str, str] = {}
