"""LN tuning: copies of the norms train, all else is frozen (Zhao 2023, arXiv:2312.11420).

Trains: the weights of every chosen norm, as a copy in the norm's own dtype; the original stays beside it.
Keeps for backward: the normalised input of each trained norm.
Not modelled: targets that are not norms.
Mirrors peft/tuners/ln_tuning/layer.py LNTuningLayer.forward and model.py (no cast of adapters), peft 0.21.2; defaults
from peft/utils/constants.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.core import ADAPTER, Graph, Region, Tensor
from peftplan.graph.edit import modules, split_runs
from peftplan.methods._linears import COMMON
from peftplan.methods._saved import save_modules
from peftplan.methods.base import Family, Host, Method, Trains
from peftplan.methods.targets import ALL_LINEAR, Names, Targets, full_path, targets

_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_ONE = ("post_attention_layernorm",)
DEFAULTS = {"llama": _NORMS, "mistral": _NORMS, "gemma": _NORMS, "qwen2": _ONE, "qwen3": _ONE}
"""TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING."""
HARMLESS = COMMON


@final
@dataclass(frozen=True)
class LnTuning(Method):
    """PEFT's LNTuningConfig."""

    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: tuple[str, ...] | None = None
    splits: ClassVar[bool] = True
    family: ClassVar[Family] = "selective"
    trains: ClassVar[Trains] = "like base"

    def default_targets(self, family: str) -> Names:
        return DEFAULTS.get(family)

    def apply(self, graph: Graph, host: Host) -> Graph:
        choice = self._choice(host.arch.family)
        split = split_runs(graph, lambda index: tuple(_chosen(r, choice, index) for r in graph.regions))
        originals: list[Tensor] = []
        regions = tuple(_copied(r, _chosen(r, choice, r.first_index), originals) for r in split.regions)
        if not originals:
            names = sorted({n.rsplit(".", 1)[-1] for r in graph.regions for n in _norms(r)})
            raise RequestError(f"--target-modules {choice.wanted!r} matches no norm; this model has {', '.join(names)}")
        return save_modules(replace(split, regions=regions, unused=(*graph.unused, *originals)), self.modules_to_save)

    def _choice(self, family: str) -> Targets:
        wanted = self.default_targets(family) if self.target_modules is None else self.target_modules
        if wanted is None:
            raise RequestError(f"PEFT has no default norms for {family}; pass --target-modules {','.join(_NORMS)}")
        if wanted == ALL_LINEAR:
            raise Unsupported("method ln_tuning on linear layers is not modelled; name norms in --target-modules")
        return targets(family, wanted, excluded=self.exclude_modules, saved=self.modules_to_save)


def _norms(region: Region) -> dict[str, Tensor]:
    """The weights of the region's norms, by module path."""
    weights = (t for op in region.ops if op.site == "norm" for t in op.ins if t.is_param)
    return {t.name.removesuffix(".weight"): t for t in weights}


def _chosen(region: Region, choice: Targets, index: int | None) -> frozenset[str]:
    """Paths of the norms to copy. Raises Unsupported where something else is chosen."""
    layer = None if region.first_index is None else index
    for _, _, m in modules(region):
        if choice.match(full_path(region, m.path, layer or 0), m.site, layer):
            raise Unsupported(f"method ln_tuning on {m.path} is not modelled; name norms in --target-modules")
    return frozenset(n for n in _norms(region) if choice.match(full_path(region, n, layer or 0), "norm", layer))


def _copied(region: Region, chosen: frozenset[str], originals: list[Tensor]) -> Region:
    names = {f"{path}.weight" for path in chosen}
    originals.extend(
        t._replace(trainable=False) for p, t in _norms(region).items() if p in chosen for _ in range(region.count)
    )

    def copy(t: Tensor) -> Tensor:
        return t._replace(kind=ADAPTER, trainable=True) if t.is_param and t.name in names else t

    return replace(region, ops=tuple(replace(op, ins=tuple(map(copy, op.ins))) for op in region.ops))


METHOD = LnTuning
EXAMPLES = (LnTuning(target_modules=_NORMS), LnTuning(target_modules=("norm",)))
UNVERIFIED: dict[str, str] = {}
