"""Which modules a method adapts: PEFT's rules for target_modules, exclude_modules and layers_to_transform.

Mirrors peft 0.21.2, peft/tuners/tuners_utils.py: check_target_module_exists, _maybe_include_all_linear_layers, and
peft/utils/constants.py: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING (2026-11).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftplan.errors import RequestError
from peftplan.graph.core import Graph, Region
from peftplan.graph.edit import Module, modules

DEFAULTS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
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

    @property
    def by_layer(self) -> bool:
        """Whether the choice may differ between layers."""
        patterns = [self.wanted] if isinstance(self.wanted, str) else list(self.wanted)
        if self.excluded is not None:
            patterns += [self.excluded] if isinstance(self.excluded, str) else list(self.excluded)
        return self.layers is not None or any(re.search(r"\d|layers", p) for p in patterns)

    def match(self, path: str, site: str, layer: int | None) -> bool:
        """Whether the module `path` (its full name in the model) is adapted."""
        if self.excluded is not None and _matches(self.excluded, path):
            return False
        found = site not in ("head", "embed") if self.wanted == ALL_LINEAR else _matches(self.wanted, path)
        if found and self.layers is not None:
            found = layer in self.layers
        return found


def _matches(pattern: str | tuple[str, ...], path: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(path == p or path.endswith("." + p) for p in pattern)


def targets(
    family: str, wanted: Names, *, excluded: Names = None, layers: Sequence[int] | int | None = None
) -> Targets:
    """Targets from PEFT's arguments; `wanted` is None where PEFT knows no defaults for the family.

    Raises RequestError for that, and where a pattern is not a regular expression.
    """
    if wanted is None:
        raise RequestError(
            f"PEFT has no default target modules for {family}; pass --target-modules, for example all-linear"
        )
    for option, pattern in (("--target-modules", wanted), ("exclude_modules", excluded)):
        if isinstance(pattern, str):
            check_pattern(option, pattern)
    if isinstance(wanted, str) and wanted != ALL_LINEAR and re.fullmatch(r"\w+", wanted):
        wanted = (wanted,)
    chosen = (layers,) if isinstance(layers, int) else tuple(layers) if layers is not None else None
    if chosen is not None and isinstance(wanted, str):
        raise RequestError(
            f"layers_to_transform needs --target-modules as a list of names, not {wanted!r} (PEFT's rule)"
        )
    return Targets(wanted=wanted, excluded=excluded, layers=chosen)


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


Choice = Callable[[Module], bool]


def chosen_paths(graph: Graph, choice: Targets) -> dict[int | str, frozenset[str]]:
    """For each layer index, and each region outside the layers by name: the paths of the modules to adapt.

    Raises RequestError where nothing matches.
    """
    found: dict[int | str, frozenset[str]] = {}
    for region in graph.regions:
        sites = [(m.path, m.site) for _, _, m in modules(region)]
        if region.first_index is None:
            hit = (p for p, site in sites if choice.match(full_path(region, p, 0), site, None))
            found[region.name] = frozenset(hit)
            continue
        indices = range(region.first_index, region.first_index + region.count)
        if not choice.by_layer:
            start = region.first_index
            same = frozenset(p for p, site in sites if choice.match(full_path(region, p, start), site, start))
            found.update(dict.fromkeys(indices, same))
            continue
        for i in indices:
            found[i] = frozenset(p for p, site in sites if choice.match(full_path(region, p, i), site, i))
    if not any(found.values()):
        names = sorted({m.path.rsplit(".", 1)[-1] for r in graph.regions for _, _, m in modules(r)})
        shown = choice.wanted if isinstance(choice.wanted, str) else ",".join(choice.wanted)
        raise RequestError(f"--target-modules {shown!r} matches nothing; this model has {', '.join(names)}")
    return found
