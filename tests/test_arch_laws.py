"""Whatever a config holds, reading it gives an Arch or one RequestError line, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from peftplan.arch import load_arch, parameter_count
from peftplan.arch.families import families
from peftplan.errors import RequestError

BASE = {
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "vocab_size": 97,
}
KEYS = sorted(
    frozenset(("auto_map", "quantization_config", "per_layer_config", "text_config")).union(
        *(family.keys for family in families().values())
    )
    - {"model_type"}
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(0, 64),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.sampled_from(["silu", "gelu", "bfloat16", "full_attention", "sliding_attention"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
CONFIGS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)


def read_or_refuse(name: str, config: dict[str, Any] | None) -> None:
    line = refusal(name, config=config)
    if line is None:
        arch = load_arch(name, config=config)
        assert parameter_count(arch) > 0
        assert arch.num_layers >= 1
        assert load_arch(name, config=arch.model_dump()).layers == arch.layers


def refusal(name: str, *, config: Any = None, overrides: Any = None) -> str | None:
    """The line that refuses, or None."""
    try:
        load_arch(name, config=config, overrides=overrides)
    except RequestError as error:
        line = str(error)
    else:
        return None
    assert "\n" not in line
    assert len(line) < 2000
    return line


@settings(max_examples=400, deadline=None)
@given(model_type=st.sampled_from([*families(), "llama\n2", "gpt2"]), keys=CONFIGS)
def test_any_values_under_known_keys(model_type: str, keys: dict[str, Any]) -> None:
    read_or_refuse("tiny", {"model_type": model_type, **BASE, **keys})


@settings(max_examples=200, deadline=None)
@given(value=VALUES)
def test_any_json_document(value: Any, tmp_path_factory: Any) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "config.json"
    path.write_text(json.dumps(value))
    read_or_refuse(str(path), None)


@settings(max_examples=200, deadline=None)
@given(overrides=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), VALUES, max_size=3))
def test_any_overrides(overrides: dict[str, Any]) -> None:
    refusal("smollm3", overrides=overrides)
