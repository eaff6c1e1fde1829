"""Readers of config.json, one file per family; the folder is the list (files that start with `_` are shared).

A family file has `MODEL_TYPES` (the `model_type` values it reads), `KEYS` (what its transformers config class
takes beyond `COMMON_KEYS`) and `read(config) -> Arch`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from peftplan.arch.config import Config
from peftplan.arch.core import Arch

_READ = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "hidden_act",
    "attention_dropout", "tie_word_embeddings", "use_cache", "dtype", "torch_dtype",
)  # fmt: skip
_WITHOUT_EFFECT_ON_SIZES = (
    "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "transformers_version",
    "architectures", "output_hidden_states", "output_attentions", "return_dict",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "num_labels",
    "problem_type",
)  # fmt: skip
COMMON_KEYS = frozenset((*_READ, *_WITHOUT_EFFECT_ON_SIZES))
"""What every family's config class takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One reader: the `model_type` values it takes and every config key that means something to it."""

    model_types: tuple[str, ...]
    keys: frozenset[str]
    read: Callable[[Config], Arch]


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Every family by `model_type`, sorted."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        family = _load(module.name)
        found.update(dict.fromkeys(family.model_types, family))
    return dict(sorted(found.items()))


def _load(name: str) -> Family:
    module = importlib.import_module(f"{__name__}.{name}")
    return Family(model_types=module.MODEL_TYPES, keys=COMMON_KEYS | set(module.KEYS), read=module.read)
