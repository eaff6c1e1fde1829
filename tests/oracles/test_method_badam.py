"""BAdam against a traced model of which a block trains under the block optimizer's own step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("peft")

import torch

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate, read
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, name, tiny_job
from tests.oracles.reference import assert_as_reference, layers_of, reference

pytestmark = pytest.mark.trace
ROWS: list[Row] = [
    ("llama", {**PLAIN}),
    ("llama", {**AGAIN, "grad_accum": 2, "set": {"method.switch_mode": "descending"}}),
    ("qwen2", {**MIXED, "dtype": "fp32"}),
    ("gemma", {**WIDE, "micro_batch": 1, "seq_len": 3}),
    ("phi3", {**PLAIN, "micro_batch": 1, "seq_len": 2}),
    ("llama", {**PLAIN, "set": {"method.switch_mode": "fixed", "method.start_block": 2}}),
    ("gemma", {**PLAIN, "set": {"method.include_embedding": True}}),
    ("llama", {**PLAIN, "set": {"method.include_lm_head": True}}),
]


class BlockAdam:
    """The step of the paper's algorithm over fp32 copies of what trains."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.held = [p.clone().float().detach().requires_grad_() for p in self.weights]
        self.base = torch.optim.AdamW(self.held)

    @property
    def state(self) -> Any:
        return self.base.state

    def step(self) -> None:
        for weight, copy in zip(self.weights, self.held, strict=True):
            copy.grad = weight.grad.float()
            weight.grad = None
        self.base.step()
        for weight, copy in zip(self.weights, self.held, strict=True):
            weight.data.copy_(copy.data.to(weight.dtype))
        self.base.zero_grad(set_to_none=True)

    def zero_grad(self, *, set_to_none: bool) -> None:
        for weight in self.weights:
            assert set_to_none
            assert weight.grad is None


def block(model: torch.nn.Module, stage: str) -> torch.nn.Module:
    model.requires_grad_(False)
    if stage.startswith("layer"):
        layers_of(model)[int(stage.split()[1])].requires_grad_(True)
    for words, path in (("embedding", "model.embed_tokens"), ("norm", "model.norm"), ("head", "lm_head")):
        if words in stage:
            model.get_submodule(path).requires_grad_(True)
    return model


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_its_worst_stage_is_what_the_block_optimizer_does(family: str, fields: dict[str, Any]) -> None:
    asked = {"method": "badam", **fields}
    stage = read(tiny_job(family, asked)).case.method.stage
    assert_as_reference(family, asked, partial(block, stage=stage), BlockAdam)


@pytest.mark.parametrize("fields", [{**PLAIN}, {**AGAIN}, {**PLAIN, "micro_batch": 1, "seq_len": 2}])
def test_no_block_is_worse_than_the_worst_stage(fields: dict[str, Any]) -> None:
    job = tiny_job("llama", {"method": "badam", **fields})
    peaks = [reference(job, partial(block, stage=f"layer {i}"), BlockAdam).peak_bytes for i in range(3)]
    assert read(job).estimate.memory.peak_bytes == max(peaks)


def test_the_paper_holds_the_model_and_sixteen_bytes_for_each_weight_of_a_block() -> None:
    """Section 2.2, memory: 2 M + 16 M / D, without activations; Llama 3-8B has D = 32 equal blocks."""
    layer = 4_096 * (2 * 4_096 + 2 * 1_024) + 3 * 4_096 * 14_336 + 2 * 4_096
    reading = read(make_job(model="llama-3-8b", method="badam", dtype="bf16", micro_batch=1, seq_len=1, backend="cpu"))
    assert reading.estimate.parameters.trainable == layer
    counters = 4 * 9
    assert reading.static["state"] == 12 * layer + counters
    fused = make_job(
        model="llama-3-8b", method="badam", dtype="bf16", micro_batch=1, seq_len=1, backend="cpu",
        optimizer="adamw_torch_fused",
    )  # fmt: skip
    memory = estimate(fused).memory
    largest, transient = 2 * 4_096 * 14_336, 4 * layer
    beyond = memory.phases["optimizer"] - memory.static_bytes - transient - largest
    assert 0 < beyond < 2**22, "the batch, its logits and the cache"


def test_the_cache_is_emptied_after_each_step() -> None:
    from peftplan.methods import get

    assert get("badam").empties_cache
    memory = estimate(make_job(model="llama-2-7b", method="badam", micro_batch=1)).memory
    assert memory.reserved_bytes is not None
    assert memory.reserved_bytes > memory.peak_bytes - 2**22


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.mode": "ratio"}}, "sparse gradients are not modelled; use layer"),
        ({"set": {"method.start_block": 32}}, "use 0 to 31"),
        ({"set": {"method.switch_mode": "fixed"}}, "set method.start_block"),
        ({"format": "nf4"}, "cannot train packed weights"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="badam", **fields))
