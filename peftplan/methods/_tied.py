"""PEFT's `ensure_weight_tying`: what is done to the embedding is done to the head, where the two are one weight.

Mirrors peft/tuners/lora/model.py LoraModel._add_targets_to_tie and _add_modules_to_save_to_tie, and
peft/tuners/tuners_utils.py BaseTuner._check_tied_modules, peft 0.21.2. Without the setting PEFT warns, and does to each
what it is asked to.
"""

from __future__ import annotations

import re
from dataclasses import replace

from peftplan.errors import RequestError
from peftplan.graph.core import ADAPTER, Graph, Tensor
from peftplan.methods.targets import Names

ENDS = ("embed_tokens", "lm_head")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def saves_ends(saved: tuple[str, ...] | None) -> bool:
    """Whether the embedding or the head is among modules_to_save."""
    return any(name.rsplit(".", 1)[-1] in ENDS for name in saved or ())


def tied_copies(saved: tuple[str, ...] | None) -> tuple[str, ...]:
    """modules_to_save with the embedding for the head."""
    return (*(name for name in saved or () if not _names(name, HEAD)), EMBEDDING)


def tied_targets(wanted: Names) -> Names:
    """target_modules with both ends where one of them is there."""
    if wanted is None or isinstance(wanted, str):
        if wanted is None or not any(re.fullmatch(wanted, end) for end in ENDS):
            return wanted
        return rf"(?:{wanted}|{re.escape(EMBEDDING)}|{HEAD})"
    if not any(name.rsplit(".", 1)[-1] in ENDS for name in wanted):
        return wanted
    return (*(name for name in wanted if not _names(name, HEAD)), EMBEDDING, HEAD)


def _names(name: str, path: str) -> bool:
    return re.match(rf"(^|.*\.){name}($|\..*)", path) is not None


def share_copy(graph: Graph) -> Graph:
    """The head reads the embedding's copy too. Raises RequestError where the head is adapted."""
    copy = next(t for t in graph.params() if t[0].name == "@embed_tokens.saved.weight")[0]
    head = graph.regions[-1]
    if any(t.kind == ADAPTER for t in head.params()):
        raise RequestError(
            "method.ensure_weight_tying: the head is adapted, and cannot be a copy too; drop one of them"
        )
    originals = tuple(t._replace(trainable=False) for t in head.params() if t.name == "@embed_tokens.weight")
    shared = replace(head, ops=tuple(op.over(tuple(_read(t, copy) for t in op.ins), op.out) for op in head.ops))
    return replace(graph, regions=(*graph.regions[:-1], shared), unused=(*graph.unused, *originals))


def _read(t: Tensor, copy: Tensor) -> Tensor:
    return copy if t.name == "@embed_tokens.weight" else t
