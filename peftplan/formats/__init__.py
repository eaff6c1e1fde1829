"""Weight formats of the frozen base: `get("nf4")` is the file `nf4.py`; `names()` is the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftplan import plugins
from peftplan.formats.base import Format

__all__ = ["Format", "canonical", "get", "make", "names"]

_SPELLINGS = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "4bit": "nf4", "8bit": "int8",
              "bnb_nf4": "nf4", "bnb_fp4": "fp4", "bnb_int8": "int8", "llm_int8": "int8", "int8wo": "torchao_int8",
              "int8_weight_only": "torchao_int8", "float8wo": "torchao_float8", "float8_weight_only": "torchao_float8",
              "int4wo": "torchao_int4", "int4_weight_only": "torchao_int4", "optimum_quanto": "quanto",
              "finegrained_fp8": "fp8"}  # fmt: skip


def names() -> tuple[str, ...]:
    return plugins.names(__name__)


def canonical(name: str) -> str:
    """The file name of a format, from any spelling of it."""
    key = plugins.canonical(name)
    return _SPELLINGS.get(key, key)


def get(name: str) -> type[Format]:
    cls: type[Format] = plugins.load(__name__, "format", canonical(name), known=tuple(_SPELLINGS)).FORMAT
    return cls


def make(name: str, knobs: Mapping[str, Any]) -> Format:
    """A format with its settings; raises RequestError for settings it does not have."""
    made: Format = plugins.configure(get(name), knobs, what=f"format {name}")
    return made
