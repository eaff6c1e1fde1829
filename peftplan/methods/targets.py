"""Which modules a method adapts: PEFT's rules for target_modules, exclude_modules, layers_to_transform, layers_pattern
and, of modules_to_save, that what it names is not adapted.

Mirrors peft 0.21.2, peft/tuners/tuners_utils.py: check_target_module_exists, _maybe_include_all_linear_layers, and
peft/utils/constants.py: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING (2026-11).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from peftplan.errors import RequestError
from peftplan.graph.core import MODULE_SITES, Graph, Region
from peftplan.graph.edit import modules

DEFAULTS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "gemma": ("q_proj", "v_proj"),
}
ALL_LINEAR = "all-linear"
Names = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """A compiled choice of modules."""

    wanted: str | tuple[str, ...]
    excluded: Names = None
    layers: tuple[int, ...] | None = None
    saved: tuple[str, ...] = ()
    """PEFT's modules_to_save: neither they nor what is inside them are adapted."""

    @property
    def by_layer(self) -> bool:
        """Whether the choice may differ between layers."""
        patterns = [*_each(self.wanted), *_each(self.excluded), *self.saved]
        return self.layers is not None or any(re.search(r"\d|layers", p) for p in patterns)

    def match(self, path: str, site: str, layer: int | None) -> bool:
        """Whether the module `path` (its full name in the model) is adapted."""
        if self.excluded is not None and _matches(self.excluded, path):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.saved):
            return False
        found = site in _LINEAR_SITES if self.wanted == ALL_LINEAR else _matches(self.wanted, path)
        if found and self.layers is not None:
            found = layer in self.layers
        return found


_LINEAR_SITES = MODULE_SITES - {"head", "embed"}


def _each(names: Names) -> Sequence[str]:
    return () if names is None else (names,) if isinstance(names, str) else names


def _matches(pattern: str | tuple[str, ...], path: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(path == p or path.endswith("." + p) for p in pattern)


def targets(
    family: str,
    wanted: Names,
    *,
    excluded: Names = None,
    layers: Sequence[int] | int | None = None,
    pattern: Names = None,
    saved: tuple[str, ...] | None = None,
) -> Targets:
    """Targets from PEFT's arguments (`layers` and `pattern` are layers_to_transform and layers_pattern); `wanted` is
    None where PEFT knows no defaults for the family.

    Raises RequestError for that, where arguments do not go together, or a pattern is not a regular expression.
    """
    if wanted is None:
        raise RequestError(
            f"PEFT has no default target modules for {family}; pass --target-modules, for example all-linear"
        )
    for option, given in (("--target-modules", wanted), ("exclude_modules", excluded)):
        if isinstance(given, str):
            check_pattern(option, given)
    for name in (*_each(pattern), *(saved or ())):
        check_pattern("layers_pattern" if saved is None or name not in saved else "modules_to_save", name)
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        wanted = ALL_LINEAR
    elif isinstance(wanted, str) and re.fullmatch(r"\w+", wanted):
        wanted = (wanted,)
    return Targets(wanted=wanted, excluded=excluded, layers=_layers(wanted, layers, pattern), saved=saved or ())


def _layers(
    wanted: str | tuple[str, ...], layers: Sequence[int] | int | None, pattern: Names
) -> tuple[int, ...] | None:
    """The layers that may be adapted; none of them where `pattern` is not what these models call their list."""
    chosen = (layers,) if isinstance(layers, int) else tuple(layers or ())
    if pattern and not chosen:
        raise RequestError("method.layers_pattern: PEFT wants layers_to_transform with it; give both or leave it out")
    if not chosen:
        return None
    if isinstance(wanted, str):
        raise RequestError(
            f"layers_to_transform needs --target-modules as a list of names, not {wanted!r} (PEFT's rule)"
        )
    named = not pattern or any(re.match(rf"(?:^|.*?\.){p}\.\d+\.", "model.layers.0.") for p in _each(pattern))
    return chosen if named else ()


def check_pattern(option: str, pattern: str) -> None:
    """Raises RequestError where `pattern` is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise RequestError(f"{option} {pattern!r} is not a regular expression: {error}") from None


def full_path(region: Region, path: str, index: int) -> str:
    """A module's name in the transformers model: `model.layers.3.self_attn.q_proj`, `lm_head`."""
    if region.first_index is not None:
        return f"model.layers.{index}.{path}"
    return path if path == "lm_head" else f"model.{path}"


def chosen_paths(graph: Graph, choice: Targets) -> dict[int | str, frozenset[str]]:
    """For each layer index, and each region outside the layers by name: the paths of the modules to adapt.

    Raises RequestError where nothing matches, or something that is no linear layer or embedding.
    """
    found: dict[int | str, frozenset[str]] = {}
    for region in graph.regions:
        sites = {m.path: m.site for _, _, m in modules(region)}
        sites = dict.fromkeys(_others(region, sites), "") | sites
        if region.first_index is None:
            found[region.name] = _hits(region, sites, choice, None)
            continue
        indices = range(region.first_index, region.first_index + region.count)
        if not choice.by_layer:
            found.update(dict.fromkeys(indices, _hits(region, sites, choice, region.first_index)))
            continue
        for i in indices:
            found[i] = _hits(region, sites, choice, i)
    if not any(found.values()):
        names = sorted({m.path.rsplit(".", 1)[-1] for r in graph.regions for _, _, m in modules(r)})
        shown = choice.wanted if isinstance(choice.wanted, str) else ",".join(choice.wanted)
        raise RequestError(f"--target-modules {shown!r} matches nothing; this model has {', '.join(names)}")
    return found


def _hits(region: Region, sites: dict[str, str], choice: Targets, layer: int | None) -> frozenset[str]:
    """The paths of the region's modules that are adapted."""
    hit = frozenset(p for p, site in sites.items() if choice.match(full_path(region, p, layer or 0), site, layer))
    other = min((p for p in hit if not sites[p]), default=None)
    if other is not None:
        raise RequestError(
            f"--target-modules {choice.wanted!r} matches {full_path(region, other, layer or 0)}, which PEFT cannot "
            "adapt; name linear layers only"
        )
    return hit


def _others(region: Region, linears: Iterable[str]) -> Iterator[str]:
    """Modules that are neither linear layers nor embeddings: norms, activations, and what holds others."""
    yield from dict.fromkeys(t.name.rsplit(".", 1)[0] for op in region.ops if op.site == "norm" for t in op.ins
                             if t.is_param)  # fmt: skip
    for path in linears:
        if "." in path:
            yield path.rsplit(".", 1)[0]
    if region.first_index is not None:
        yield "mlp.act_fn"
