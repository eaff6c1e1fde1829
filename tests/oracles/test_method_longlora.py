"""LongLoRA against a traced model whose attention is shifted as LLaMA-Factory does it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftplan.errors import RequestError
from peftplan.instruments.casting import cast_adapter
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, name
from tests.oracles.reference import assert_as_reference

pytestmark = pytest.mark.trace
LONG: dict[str, Any] = {"seq_len": 16}
ROWS: list[Row] = [
    ("llama", {**PLAIN, **LONG}),
    ("llama", {**AGAIN, **LONG}),
    ("qwen2", {**MIXED, **LONG, "dtype": "bf16"}),
    ("gemma", {**WIDE, **LONG}),
    ("phi3", {**PLAIN, **LONG, "set": {"method.trainable_params": ("norm",)}}),
]


def shifted_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float = 0.0, scaling: Any = None, **_: Any
) -> tuple[Any, None]:
    """llama_sdpa_attention_forward from the repeated keys to the output projection."""
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    size, heads, seq, dim = query.shape
    part = int(seq * 0.25)

    def shift(state: torch.Tensor) -> torch.Tensor:
        state = state.transpose(1, 2)
        moved = state[:, :, heads // 2 :].roll(-part // 2, dims=1)
        state = torch.cat((state[:, :, : heads // 2], moved), dim=2)
        return state.reshape(size * seq // part, part, heads, dim).transpose(1, 2)

    query, key, value = shift(query), shift(key), shift(value)
    if mask is not None:
        mask = mask[:, :, :part, :part].repeat(seq // part, 1, 1, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )
    out = out.transpose(1, 2).contiguous()
    out = torch.cat((out[:, :, : heads // 2], out[:, :, heads // 2 :].roll(part // 2, dims=1)), dim=2)
    return out.reshape(size, seq, heads, dim), None


def adapted(model: torch.nn.Module, targets: list[str], words: tuple[str, ...]) -> torch.nn.Module:
    model = inject_adapter_in_model(LoraConfig(r=8, target_modules=targets), model.requires_grad_(False))
    cast_adapter(model, None)
    for key, param in model.named_parameters():
        if any(word in key for word in words):
            param.requires_grad_(True)
    return model


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_it_is_what_the_code_does(family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", shifted_attention)
    targets = ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    words = fields.get("set", {}).get("method.trainable_params", ("embed", "norm"))
    change = partial(adapted, targets=targets, words=words)
    assert_as_reference(family, {"method": "longlora", **fields}, change)


def test_the_paper_trains_two_percent_more_for_embedding_and_norms() -> None:
    """Section 3.3: of Llama2 7B the embedding holds less than 2 % of the weights, the norms 0.004 %."""
    counts = {}
    for words in ((), ("norm",), ("embed", "norm")):
        job = make_job(model="llama-2-7b", method="longlora", seq_len=1024, set={"method.trainable_params": words})
        counts[words] = estimate(job).parameters.trainable
    adapters, normed, both = counts.values()
    assert adapters == 32 * 4 * 8 * 2 * 4_096
    assert round(100 * (normed - adapters) / 6_738_415_616, 3) == 0.004
    assert 1.9 < 100 * (both - normed) / 6_738_415_616 < 2


def test_attention_computes_a_quarter() -> None:
    long, plain = (
        estimate(make_job(model="llama-2-7b", method=method, seq_len=8192, micro_batch=1, rank=8)).flops.forward
        for method in ("longlora", "lora")
    )
    scores = 32 * 4 * 8192**2 * 4_096
    more = 32 * 2 * 8192 * 8 * 2 * 4_096 * 2  # longlora adapts k and o besides
    assert plain + more - long == scores * 3 // 4


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seq_len": 1023}, "does not split into parts of 255"),
        ({"set": {"method.group_size_ratio": 0.0}}, "must be above 0"),
        ({"attention": "eager"}, "eager is not modelled; use sdpa"),
        ({"batching": "packed", "attention": "fa2", "dtype": "bf16"}, "packed rows"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "longlora", "seq_len": 1024, **fields}))
