"""SSF against a traced model with the paper's modules put in, and against the paper's count."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("peft")

import torch

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, Row, name
from tests.oracles.reference import assert_as_reference, replace_modules

pytestmark = pytest.mark.trace
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
ROWS: list[Row] = [
    ("llama", {**PLAIN}),
    ("llama", {**AGAIN, "grad_accum": 2}),
    ("qwen2", {**MIXED, "dtype": "bf16"}),
    ("gemma", {**WIDE}),
    ("phi3", {**PLAIN, "adapter_dtype": "bf16"}),
    ("qwen2", {**PACKED}),
    ("llama", {**PLAIN, "target_modules": ("v_proj",), "set": {"method.norms": ("norm",)}}),
]


class Moved(torch.nn.Module):  # type: ignore[misc]
    """A layer, and the scale and shift of what it gives."""

    def __init__(self, base: torch.nn.Module, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.scale = torch.nn.Parameter(torch.ones(width, dtype=dtype))
        self.shift = torch.nn.Parameter(torch.zeros(width, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        return (out * self.scale + self.shift).to(out.dtype)


def moved(model: torch.nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> torch.nn.Module:
    model.requires_grad_(False)
    return replace_modules(model, names, lambda _, base: Moved(base, width(base), dtype))


def width(base: torch.nn.Module) -> int:
    return int(base.out_features if isinstance(base, torch.nn.Linear) else base.weight.shape[0])


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_it_is_what_the_paper_does(family: str, fields: dict[str, Any]) -> None:
    names = (*fields.get("target_modules", LINEARS), *fields.get("set", {}).get("method.norms", NORMS))
    dtype = torch.bfloat16 if fields.get("adapter_dtype") else torch.float32
    assert_as_reference(family, {"method": "ssf", **fields}, partial(moved, names=names, dtype=dtype))


def test_the_paper_trains_0_28_million_of_a_vit() -> None:
    """Its abstract has about 0.3M: what stands behind each layer of ViT-B/16, whose widths this decoder has, the patch
    embedding's two vectors, and a linear classifier of 100 classes."""
    config = {
        "model_type": "phi3", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "intermediate_size": 1536, "vocab_size": 100, "max_position_embeddings": 64,
    }  # fmt: skip
    found = estimate(make_job(model="as wide as ViT-B/16", config=config, method="ssf", seq_len=8)).parameters.trainable
    patches, classifier = 2 * 768, 768 * 100 + 100
    assert found + patches == 12 * 2 * (3 * 768 + 768 + 4 * 768 + 768 + 2 * 768) + 4 * 768 == 205_824
    assert round((found + patches + classifier) / 1e6, 1) == 0.3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.norms": ("q_norm",)}}, "'q_norm' is not one of input_layernorm"),
        ({"target_modules": ("query",)}, "matches nothing"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="ssf", **fields))
