"""A config.json being read: typed look-ups that fail in one line naming the key.

Defaults and meanings are those of transformers 5.23.0 (`models/*/configuration_*.py`, read 2026-11-21).
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from peftplan.arch.core import Activation, Arch, Experts, Layer, NormKind
from peftplan.errors import RequestError, Unsupported
from peftplan.units import DType, parse_dtype

LARGEST_SIZE = 2**24
"""No size of a released model comes near it (the widest vocabulary in the catalog is 262,208)."""
LONGEST_NAME = 1000
"""Characters; longer than any path or Hub id that works."""
LARGEST_DEPTH = 10_000
LARGEST_POSITIONS = 2**40

EXPERTS = (
    "experts are multiplied in groups (transformers' grouped_mm), so no size depends on how the router spreads tokens; "
    "temporaries of CUDA's sort and top-k are left out, which says a little too little"
)
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def show(value: object) -> str:
    """`value` as JSON spells it, cut to a readable length."""
    names = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    return reprlib.repr(value)


def printable(text: str) -> str:
    """`text` as it is where that fits on a line, else quoted, escaped and cut."""
    return text if text.isprintable() and len(text) <= LONGEST_NAME else show(text)


def runs(layers: Iterable[Layer]) -> tuple[tuple[Layer, int], ...]:
    """Equal neighbours joined: (layer, how many)."""
    return tuple((layer, sum(1 for _ in group)) for layer, group in groupby(layers))


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The keys of one config.json. `label` is how errors name it, `name` how answers name the model."""

    values: Mapping[str, Any]
    name: str
    label: str
    notes: tuple[str, ...] = ()

    def wrong(self, problem: str) -> RequestError:
        return RequestError(f"{self.label}: {problem}")

    def unsupported(self, problem: str) -> Unsupported:
        return Unsupported(f"{self.label}: {problem}")

    def stated(self, key: str) -> bool:
        """Present and not null."""
        return self.values.get(key) is not None

    def size(self, key: str, default: int | None = None, *, largest: int = LARGEST_SIZE) -> int:
        """A whole number from 1 to `largest`; absent means `default`, or an error where there is none."""
        if key not in self.values:
            if default is None:
                raise self.wrong(f"{key} is missing")
            return default
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(f"{key} must be a positive whole number, not {show(value)}")
        if value > largest:
            raise self.wrong(f"{key} is {show(value)}, more than the largest believable value {largest:,}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(f"{key} must be true or false, not {show(value)}")
        return value

    def probability(self, key: str) -> float:
        """A number from 0 to 1; 0 where absent or null."""
        value = self.values.get(key)
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self.wrong(f"{key} must be a number from 0 to 1, not {show(value)}")
        return float(value)

    def entries(self, key: str) -> list[Any] | None:
        """A list, or None where absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            raise self.wrong(f"{key} must be a list, not {show(value)}")
        return value

    def fields(self, key: str) -> Mapping[str, Any]:
        """An object; empty where absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(f"{key} must be an object, not {show(value)}")
        return value or {}

    @property
    def depth(self) -> int:
        return self.size("num_hidden_layers", largest=LARGEST_DEPTH)

    @property
    def heads(self) -> int:
        return self.size("num_attention_heads")

    def kv_heads(self, default: int | None = None) -> int:
        """`num_key_value_heads`, a divisor of the heads; absent means `default` (else all), null all."""
        if "num_key_value_heads" in self.values and not self.stated("num_key_value_heads"):
            return self.heads
        value = self.size("num_key_value_heads", default or self.heads)
        if self.heads % value:
            raise self.wrong(f"num_attention_heads ({self.heads}) must be a multiple of num_key_value_heads ({value})")
        return value

    def head_dim(self, default: int | None = None) -> int:
        """`head_dim`, even for the rotation; absent means `default`, else hidden_size / heads."""
        if self.stated("head_dim") or default is not None:
            value = self.size("head_dim", default)
        else:
            value = self._split_hidden()
        if value % 2:
            raise self.wrong(f"head_dim is {value}; rotary embeddings need an even one")
        return value

    def _split_hidden(self) -> int:
        hidden = self.size("hidden_size")
        if hidden % self.heads:
            raise self.wrong(
                f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({self.heads}) "
                "where head_dim is not given"
            )
        return hidden // self.heads

    def activation(self, default: str = "silu") -> Activation:
        name = self.values.get("hidden_act", default)
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise self.unsupported(
                f"hidden_act {show(name)} is not modelled; modelled: {', '.join(sorted(_ACTIVATIONS))}"
            )
        return _ACTIVATIONS[name]

    @property
    def dtype(self) -> DType | None:
        """`dtype`, else `torch_dtype` (its older name), else None."""
        key = "dtype" if self.stated("dtype") else "torch_dtype"
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(f"{key} must be the name of an element type, not {show(value)}")
        try:
            dtype = parse_dtype(value)
        except RequestError:
            raise self.wrong(
                f"{key} {show(value)} is not a known element type; use bfloat16, float16 or float32"
            ) from None
        if not dtype.is_float:
            raise self.wrong(f"{key} must be a floating-point type, not {value!r}")
        return dtype

    def decoder(
        self,
        layers: Iterable[Layer],
        *,
        tied: bool,
        max_positions: int,
        norm: NormKind = "rms",
        embed_scale: bool = False,
        returns_cache: bool = False,
        idle_window: int | None = None,
        multiplies: bool = False,
    ) -> Arch:
        """The Arch with these layers; `tied` and `max_positions` are what an absent key means."""
        stack = runs(layers)
        dtype = self.dtype
        notes = self.notes
        if dtype is None:
            notes = (*notes, f"{self.label} states no dtype; float32 is taken, as transformers does")
        if any(isinstance(layer.mlp, Experts) for layer, _ in stack):
            notes = (*notes, EXPERTS)
        return Arch(
            name=self.name,
            family=str(self.values["model_type"]),
            hidden=self.size("hidden_size"),
            vocab=self.size("vocab_size"),
            layers=stack,
            norm=norm,
            tied=self.flag("tie_word_embeddings", tied),
            embed_scale=embed_scale,
            dtype=dtype or DType.float32,
            max_positions=self.size("max_position_embeddings", max_positions, largest=LARGEST_POSITIONS),
            use_cache=self.flag("use_cache", True),
            returns_cache=returns_cache,
            idle_window=idle_window,
            multiplies=multiplies,
            config=self._json(),
            notes=notes,
        )

    def _json(self) -> str:
        try:
            return json.dumps(dict(self.values), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise self.wrong(f"cannot be written as JSON: {error}") from None
