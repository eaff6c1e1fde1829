"""Tensor parallelism: one rank of the real model, split by transformers' own plan in torch's fake process group.

Counts, stored bytes, states, bytes kept for backward and FLOPs of the rank are equal, and the peak of every phase.
"""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import OutsideError, RequestError
from peftplan.instruments.answer import Trace
from peftplan.instruments.trace import trace
from peftplan.job import Job, make_job
from peftplan.pipeline import Reading, read
from peftplan.step.work import passes
from tests.oracles.equal import SIZES, name

TIED: dict[str, Any] = {"tie_word_embeddings": True}
BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
WIDE: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 6}
LORA: dict[str, Any] = {"method": "lora", "rank": 4}
EVERYWHERE: dict[str, Any] = {**LORA, "settings": {"method.target_modules": "all-linear"}}
ROWS: dict[str, Any] = {**LORA, "settings": {"method.target_modules": ("o_proj", "k_proj", "down_proj")}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "full": ("llama", {}, {}),
    "full, even vocabulary": ("llama", {"vocab_size": 96}, {}),
    "full, tied": ("llama", TIED, {}),
    "full, tied, even vocabulary": ("llama", {**TIED, "vocab_size": 96}, {}),
    "full, biases": ("llama", BIASED, {}),
    "full, fp32": ("mistral", {}, {"precision": "fp32"}),
    "full, autocast": ("qwen3", {}, {"precision": "bf16-mixed"}),
    "full, embeddings scaled": ("gemma", {"head_dim": 16}, {}),
    "full, eager attention": ("llama", {}, {"attention": "eager", "batching": "padded"}),
    "full on 4": ("llama", WIDE, {"layout": "tp=4"}),
    "full on 8": ("qwen2", WIDE, {"layout": "tp=8"}),
    "full on 3, nothing else divides": ("llama", {"num_key_value_heads": 3}, {"layout": "tp=3"}),
    "freeze": ("llama", {}, {"method": "freeze", "settings": {"method.layers": 1}}),
    "bitfit": ("llama", BIASED, {"method": "bitfit"}),
    "ln_tuning": ("llama", {}, {"method": "ln_tuning"}),
    "lora": ("llama", {}, LORA),
    "lora everywhere": ("llama", {}, EVERYWHERE),
    "lora on rows and columns": ("qwen2", {}, ROWS),
    "lora on 4": ("qwen2", WIDE, {**EVERYWHERE, "layout": "tp=4"}),
    "lora on 8": ("llama", WIDE, {**ROWS, "layout": "tp=8"}),
    "lora, biases": ("llama", BIASED, {**LORA, "settings": {"method.lora_bias": True, "method.bias": "all"}}),
    "lora, dropout": ("llama", {}, {**LORA, "settings": {"method.lora_dropout": 0.1}}),
    "lora, autocast, recomputed": ("qwen3", {}, {**LORA, "precision": "bf16-mixed", "recompute": "full"}),
    "lora_fa": ("llama", {}, {"method": "lora_fa", "rank": 4}),
}


def _job(family: str, config: dict[str, Any], fields: dict[str, Any]) -> Job:
    plain: dict[str, Any] = {
        "micro_batch": 3, "seq_len": 17, "backend": "cpu", "attention": "sdpa", "precision": "bf16",
        "batching": "exact", "recompute": "none", "method": "full", "layout": "tp=2",
    }  # fmt: skip
    sizes = {**SIZES, "num_hidden_layers": 2}
    return make_job(model=family, config={"model_type": family, **sizes, **config}, **{**plain, **fields})


def _predicted(found: Reading) -> dict[str, int]:
    answer, memory = found.estimate, found.estimate.memory
    runs = passes(found.step.segments, forwards=1)
    return {
        "total": answer.parameters.total,
        "trainable": answer.parameters.trainable,
        "weights": found.static["weight"] + found.static["adapter"],
        "states": found.static["state"],
        "saved": memory.saved_for_backward_bytes,
        **{what: sum(run.flops for run in runs if run.name == what) for what in ("forward", "backward")},
        **{f"peak of {phase}": memory.phases[phase] for phase in ("forward", "loss", "backward", "optimizer")},
    }


def _traced(real: Trace) -> dict[str, int]:
    kinds = real.static
    return {
        "total": real.parameters["total"],
        "trainable": real.parameters["trainable"],
        "weights": kinds["parameter"],
        "states": kinds["optimizer"] + kinds["optimizer_step"],
        "saved": real.saved_for_backward_bytes,
        **{what: real.flops[what] for what in ("forward", "backward")},
        **{f"peak of {phase}": real.phases[phase] for phase in ("forward", "loss", "backward", "optimizer")},
    }


@pytest.mark.parametrize("case", CASES, ids=name)
def test_one_rank_is_the_traced_one(case: str) -> None:
    job = _job(*CASES[case])
    assert _predicted(read(job)) == _traced(trace(job))


def test_layers_that_run_again() -> None:
    """The recomputation stops in another place: peak within a fiftieth."""
    job = _job("qwen2", {}, {"recompute": "full", "batching": "padded"})
    found, real = read(job).estimate.memory, trace(job)
    assert found.saved_for_backward_bytes == real.saved_for_backward_bytes
    assert found.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another adapter": ({"method": "ia3"}, "PEFT splits LoRA alone"),
    "packed weights": ({"method": "qlora"}, "bitsandbytes"),
    "DoRA": ({"method": "dora"}, "method.use_dora: PEFT has none on split layers"),
    "copies": ({**LORA, "settings": {"method.modules_to_save": ("lm_head",)}}, "method.modules_to_save"),
    "an adapted head": ({**LORA, "settings": {"method.target_modules": ("lm_head",)}}, "no lm_head that ranks share"),
}


@pytest.mark.parametrize("case", REFUSED, ids=name)
def test_what_the_libraries_refuse_is_refused(case: str) -> None:
    fields, why = REFUSED[case]
    with pytest.raises(RequestError, match=why):
        read(_job("llama", {}, fields))


@pytest.mark.parametrize(
    "fields", [{"method": "ia3"}, {"method": "qlora"}, {**LORA, "settings": {"method.use_dora": True}}]
)
def test_the_libraries_do_refuse_it(fields: dict[str, Any]) -> None:
    with pytest.raises((OutsideError, RequestError)):
        trace(_job("llama", {}, fields))


BOTH: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "full": ("llama", {}, {"layout": "fsdp=2,tp=2"}),
    "full, tied": ("llama", TIED, {"layout": "fsdp=4,tp=2"}),
    "full on 3 x 2": ("qwen2", {}, {"layout": "fsdp=3,tp=2"}),
    "full, recomputed": ("llama", {}, {"layout": "fsdp=2,tp=2", "recompute": "full", "batching": "padded"}),
    "lora": ("llama", {}, {**LORA, "layout": "fsdp=2,tp=2"}),
    "lora on 8 x 4": ("qwen2", WIDE, {**EVERYWHERE, "layout": "fsdp=8,tp=4"}),
    "lora, recomputed": ("llama", {}, {**EVERYWHERE, "layout": "fsdp=2,tp=2", "recompute": "full"}),
    "lora in groups that hold copies": ("llama", {}, {**ROWS, "layout": "dp_replicate=2,dp_shard=2,fsdp,tp=2"}),
}


@pytest.mark.parametrize("case", BOTH, ids=name)
def test_split_weights_are_sharded_too(case: str) -> None:
    """fully_shard on the ranks that share nothing: what is held, and the peak within a fiftieth."""
    job = _job(*BOTH[case])
    found, real = read(job), trace(job)
    guess, seen = _predicted(found), _traced(real)
    held = ("total", "trainable", "weights", "states", "saved", "forward", "backward")
    assert {what: guess[what] for what in held} == {what: seen[what] for what in held}
    assert found.estimate.memory.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
