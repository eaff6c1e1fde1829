"""What PEFT makes of LoRA's targets on models whose experts transformers 5 stacks: names of modules that were become
names of parameters.

Mirrors peft 0.21.2, peft/utils/transformers_weight_conversion.py: _convert_peft_config_moe and
_resolve_string_target_modules. Where gate and up of an expert are targeted, the matrix that holds both has twice the
rank; the router, a module of its own kind, is targeted by its weight. A pattern is resolved to the last parts of the
names that it matches, in whatever layers. PEFT does none of it for qwen2_moe, and for methods other than LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from peftplan.errors import RequestError
from peftplan.graph.core import Graph
from peftplan.graph.edit import modules
from peftplan.methods.targets import ALL_LINEAR, Names, Targets, full_path, targets

_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_FUSED = {"mixtral": ("w1", "w3"), "qwen": ("gate_proj", "up_proj")}
_KINDS = {"mixtral": "mixtral", "qwen3_moe": "qwen", "deepseek_v3": "qwen"}
"""Which table a family's targets are converted by (transformers' _MODEL_TO_CONVERSION_PATTERN and PEFT's own line)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """LoRA's targets as PEFT goes on with them."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    ranks: dict[str, int]
    """What is added to `rank_pattern`."""


def converted(graph: Graph, family: str, choice: Targets | None, parameters: tuple[str, ...], rank: int) -> Converted:
    """PEFT's conversion; `choice` is None where the job names no modules.

    Raises RequestError where PEFT does: half of a fused matrix is named, or nothing.
    """
    kind = _KINDS[family]
    table = _MIXTRAL if kind == "mixtral" else _QWEN
    names = _named(graph, choice, table) if choice is not None else ()
    renamed = {name: next((old for old in table if name == old or name.endswith(f".{old}")), None) for name in names}
    found = {old for old in renamed.values() if old is not None}
    ranks = _fused_ranks(kind, found, rank)
    kept = tuple(name for name, old in renamed.items() if old is None)
    params = tuple(dict.fromkeys((*parameters, *(table[old] for old in table if old in found))))
    if not kept and not params:
        raise RequestError(
            f"LoRA on {family} has no default targets: PEFT empties them where it converts names for transformers 5 "
            "and then refuses; pass --target-modules, for example q_proj,v_proj"
        )
    return Converted(modules=kept, parameters=params, ranks=ranks)


def converts(family: str) -> bool:
    """Whether PEFT converts LoRA's targets on this family."""
    return family in _KINDS


def _fused_ranks(kind: str, found: set[str], rank: int) -> dict[str, int]:
    parts = _FUSED[kind]
    present = [part for part in parts if part in found]
    if present and len(present) < len(parts):
        missing = ", ".join(part for part in parts if part not in found)
        raise RequestError(
            f"--target-modules {present[0]} without {missing}: transformers 5 holds both in one gate_up_proj, and PEFT "
            "adapts both or none; name both"
        )
    return {r".*\.gate_up_proj": rank * len(parts)} if present else {}


def _named(graph: Graph, choice: Targets, table: dict[str, str]) -> tuple[str, ...]:
    """The names that PEFT goes on with: those of a list as they are, of a pattern the last parts of what it matches."""
    if not isinstance(choice.wanted, str):
        return choice.wanted
    if choice.wanted == ALL_LINEAR:
        linears = {path.rsplit(".", 1)[-1] for path, site in _linears(graph) if choice.match(path, site, None)}
        return (*sorted(linears), *table)
    matched = {key.rsplit(".", 1)[-1] for key in _keys(graph) if choice.match(key, "", None)}
    inside = {old for old, new in table.items() for key in _keys(graph)
              if key.endswith(f".{new}") and choice.match(key.removesuffix(new) + old, "", None)}  # fmt: skip
    return tuple(sorted(matched | inside))


def _linears(graph: Graph) -> Iterator[tuple[str, str]]:
    for region in graph.regions:
        for _, _, module in modules(region):
            yield full_path(region, module.path, region.first_index or 0), module.site


def _keys(graph: Graph) -> Iterator[str]:
    """Names of linear layers, norms, routers and stacked weights in every layer."""
    for region in graph.regions:
        first = region.first_index
        names = {t.name.removeprefix("@").removesuffix(".weight") for t in region.params()}
        for index in range(first, first + region.count) if first is not None else (0,):
            yield from (full_path(region, name, index) for name in names)


def read_choice(family: str, wanted: Names, excluded: Names, saved: tuple[str, ...] | None) -> Targets | None:
    """What the job names, as PEFT's conversion looks at it; None where it names nothing."""
    if wanted is None or wanted == ():
        return None
    if isinstance(wanted, str) and re.fullmatch(r"\w+", wanted) and wanted != ALL_LINEAR:
        wanted = (wanted,)
    return targets(family, wanted, excluded=excluded, saved=saved)
