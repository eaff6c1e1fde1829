"""What must hold for every model and job: drawn at random over the supported families and methods.

Sizes are small and awkward (odd widths, grouped heads): formulas do not care, wrong dimensions cannot hide.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftplan.graph.ops import FusedAttention
from peftplan.job import Job, make_job
from peftplan.pipeline import Reading, estimate, read
from peftplan.result import Estimate

LAW = settings(deadline=None, max_examples=50, derandomize=True)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3")
FUSED = {"phi3"}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A small config.json of one of the families."""
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    heads = kv_heads * draw(st.sampled_from((1, 2, 4)))
    head_dim = draw(st.sampled_from((16, 24, 40)))
    return {
        "model_type": draw(st.sampled_from(FAMILIES)),
        "hidden_size": heads * head_dim,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw(st.sampled_from((40, 88, 136))),
        "num_hidden_layers": draw(st.integers(2, 4)),
        "vocab_size": draw(st.sampled_from((97, 256, 1111))),
        "tie_word_embeddings": draw(st.booleans()),
        "torch_dtype": draw(st.sampled_from(("bfloat16", "float16", "float32"))),
        "max_position_embeddings": 512,
    }


@st.composite
def jobs(draw: st.DrawFn, methods: tuple[str, ...] = ("full", "freeze", "lora", "qlora")) -> dict[str, Any]:
    """The fields of a job on such a model."""
    method = draw(st.sampled_from(methods))
    fields: dict[str, Any] = {
        "model": "drawn",
        "config": draw(configs()),
        "method": method,
        "micro_batch": draw(st.integers(1, 4)),
        "seq_len": draw(st.integers(2, 70)),
        "batching": draw(st.sampled_from(("padded", "exact"))),
        "recompute": draw(st.sampled_from(("none", "full"))),
        "attention": draw(st.sampled_from(("sdpa", "eager", "flash_attention_2"))),
        "optimizer": draw(st.sampled_from(("adamw", "adamw_8bit"))),
        "grad_accum": draw(st.sampled_from((1, 2))),
        "backend": draw(st.sampled_from(("cuda", "cpu"))),
        "precision": draw(st.sampled_from((None, "bf16-mixed"))),
        "set": {"model.use_cache": draw(st.booleans())},
    }
    if fields["config"]["torch_dtype"] == "float32" and fields["attention"] == "flash_attention_2":
        fields["attention"] = "sdpa"  # flash attention has no fp32 form
    if method == "freeze":
        fields["set"]["method.layers"] = draw(st.integers(1, fields["config"]["num_hidden_layers"]))
    if method in ("lora", "qlora"):
        fields["rank"] = draw(st.integers(1, 8))
        fields["target_modules"] = draw(chosen(fields))
        fields["format"] = draw(st.sampled_from((None, "nf4", "fp4", "int8") if method == "lora" else (None, "fp4")))
        fields["set"]["method.lora_dropout"] = draw(st.sampled_from((0.0, 0.1)))
    return fields


def names(fields: dict[str, Any]) -> tuple[str, ...]:
    return FUSED_TARGETS if fields["config"]["model_type"] in FUSED else TARGETS


def chosen(fields: dict[str, Any]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names(fields)), min_size=1, unique=True)


def job(fields: dict[str, Any], **changes: Any) -> Job:
    return make_job(**{**fields, **changes})


def answer(fields: dict[str, Any], **changes: Any) -> Estimate:
    return estimate(job(fields, **changes))


def reading(fields: dict[str, Any], **changes: Any) -> Reading:
    return read(job(fields, **changes))


# -- sums -------------------------------------------------------------------------------------------


@LAW
@given(jobs())
def test_tables_sum_to_their_totals(fields: dict[str, Any]) -> None:
    memory = answer(fields).memory
    assert sum(memory.at_peak.values()) == memory.peak_bytes
    assert min(memory.at_peak.values()) > 0
    assert max(memory.phases.values()) == memory.peak_bytes
    assert memory.phases[memory.at_peak_phase] == memory.peak_bytes


@LAW
@given(jobs())
def test_what_lives_between_steps_lives_in_every_phase(fields: dict[str, Any]) -> None:
    memory = answer(fields).memory
    step = {phase: size for phase, size in memory.phases.items() if phase != "load"}  # before there are states
    assert {phase: size for phase, size in step.items() if size < memory.static_bytes} == {}


@LAW
@given(jobs())
def test_counts_are_consistent(fields: dict[str, Any]) -> None:
    found = answer(fields)
    assert 0 < found.parameters.trainable <= found.parameters.total
    assert found.flops.total == found.flops.forward + found.flops.backward + found.flops.recompute
    assert found.flops.recompute <= found.flops.forward
    if fields["method"] == "full":
        assert found.parameters.trainable == found.parameters.total


# -- more never needs less --------------------------------------------------------------------------


@LAW
@given(jobs(), st.integers(1, 3))
def test_more_sequences_never_lower_the_peak(fields: dict[str, Any], more: int) -> None:
    bigger = answer(fields, micro_batch=fields["micro_batch"] + more)
    assert bigger.memory.peak_bytes >= answer(fields).memory.peak_bytes


@LAW
@given(jobs(), st.integers(1, 30))
def test_longer_sequences_never_lower_the_peak(fields: dict[str, Any], more: int) -> None:
    longer = answer(fields, seq_len=fields["seq_len"] + more)
    assert longer.memory.peak_bytes >= answer(fields).memory.peak_bytes


@LAW
@given(jobs(("lora", "qlora")), st.integers(1, 8))
def test_a_higher_rank_never_lowers_the_peak(fields: dict[str, Any], more: int) -> None:
    higher, lower = answer(fields, rank=fields["rank"] + more), answer(fields)
    assert higher.memory.peak_bytes >= lower.memory.peak_bytes
    assert higher.parameters.trainable > lower.parameters.trainable


@LAW
@given(jobs(("lora", "qlora")), st.data())
def test_more_targets_never_train_or_keep_less(fields: dict[str, Any], data: st.DataObject) -> None:
    more = sorted({*fields["target_modules"], *data.draw(chosen(fields))})
    few, many = answer(fields), answer(fields, target_modules=more)
    assert many.parameters.trainable >= few.parameters.trainable
    assert many.memory.saved_for_backward_bytes >= few.memory.saved_for_backward_bytes
    assert many.flops.forward >= few.flops.forward


@LAW
@given(jobs(("freeze",)))
def test_freezing_never_keeps_more(fields: dict[str, Any]) -> None:
    layers = fields["set"]["method.layers"]
    if layers == 1:
        return
    fewer = answer(fields, set={**fields["set"], "method.layers": layers - 1})
    more = answer(fields)
    full = answer(fields, method="full", set={"model.use_cache": fields["set"]["model.use_cache"]})
    saved = [found.memory.saved_for_backward_bytes for found in (fewer, more, full)]
    assert saved == sorted(saved)


@LAW
@given(jobs())
def test_recomputation_keeps_no_more_and_computes_no_less(fields: dict[str, Any]) -> None:
    plain, again = answer(fields, recompute="none"), answer(fields, recompute="full")
    assert again.memory.saved_for_backward_bytes <= plain.memory.saved_for_backward_bytes
    assert again.flops.total >= plain.flops.total
    assert again.flops.forward == plain.flops.forward


# -- FLOPs ------------------------------------------------------------------------------------------


@LAW
@given(jobs())
def test_backward_computes_at_most_twice_the_forward(fields: dict[str, Any]) -> None:
    """Two products per product; fused attention has five for two, as it computes its scores again."""
    found = reading(fields)
    regions = found.graph.regions
    fused = sum(r.count * op.flops() for r in regions for op in r.ops if isinstance(op, FusedAttention))
    flops = found.estimate.flops
    assert 2 * flops.backward <= 4 * flops.forward + fused


@LAW
@given(jobs(("full",)))
def test_full_fine_tuning_computes_at_least_one_product_back_for_each(fields: dict[str, Any]) -> None:
    flops = answer(fields).flops
    assert flops.backward >= flops.forward


@LAW
@given(jobs(), st.integers(2, 3))
def test_flops_are_linear_in_the_micro_batch(fields: dict[str, Any], times: int) -> None:
    many = answer(fields, micro_batch=times * fields["micro_batch"]).flops
    assert many.forward == times * answer(fields).flops.forward


# -- whole answers ----------------------------------------------------------------------------------


@LAW
@given(jobs())
def test_a_resolved_job_gives_the_same_answer(fields: dict[str, Any]) -> None:
    first = answer(fields)
    second = estimate(first.job)
    for section in ("parameters", "memory", "flops", "time", "cost", "fit"):
        assert getattr(second, section) == getattr(first, section), section
    assert estimate(second.job).job == second.job
    assert estimate(Job.model_validate_json(first.job.model_dump_json())).memory == first.memory


@LAW
@given(jobs(("lora",)))
def test_packed_weights_are_smaller_than_bf16(fields: dict[str, Any]) -> None:
    """Where the linear layers outweigh what qlora holds in fp32: embedding, head and norms."""
    config = {**fields["config"], "vocab_size": 16, "intermediate_size": 512, "torch_dtype": "bfloat16"}
    wide = {
        **fields,
        "format": None,
        "precision": None,
        "config": {**config, "hidden_size": 16 * config["num_attention_heads"], "head_dim": 16},
    }
    packed = answer(wide, method="qlora").parameters
    plain = answer(wide).parameters
    assert packed.stored_bytes < plain.stored_bytes
    assert packed.trainable == plain.trainable
    assert packed.total == plain.total


@LAW
@given(jobs(), st.sampled_from(("a100-80gb", "rtx-4090", "h100")))
def test_time_is_an_interval(fields: dict[str, Any], gpu: str) -> None:
    time = answer(fields, gpu=gpu, backend="cuda").time
    assert time.step_seconds is not None
    assert time.breakdown is not None
    assert 0 < time.step_seconds.low <= time.step_seconds.expected <= time.step_seconds.high
    assert sum(time.breakdown.values()) == pytest.approx(time.step_seconds.expected)
    assert time.mfu is not None
    assert 0 < time.mfu < 1


@LAW
@given(jobs())
def test_every_null_has_a_reason(fields: dict[str, Any]) -> None:
    found = answer(fields)
    said = {note.what for note in found.assumptions}
    for section in ("time", "cost", "fit"):
        for name, value in getattr(found, section).model_dump().items():
            if value is None:
                assert said & {section, f"{section}.{name}"}, f"{section}.{name}"
