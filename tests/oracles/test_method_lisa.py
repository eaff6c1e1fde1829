"""LISA against a traced model of which some layers train, and against what its callbacks leave in the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import combinations
from typing import Any

import pytest

pytest.importorskip("peft")

import torch

from peftplan.breakdown import explain
from peftplan.errors import RequestError
from peftplan.instruments import build
from peftplan.job import make_job
from peftplan.pipeline import estimate, read
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, name, tiny_job
from tests.oracles.reference import assert_as_reference, layers_of, reference

pytestmark = pytest.mark.trace
ROWS: list[Row] = [
    ("llama", {**PLAIN}),
    ("llama", {**AGAIN, "grad_accum": 2}),
    ("qwen2", {**MIXED, "dtype": "fp32"}),
    ("gemma", {**WIDE, "set": {"method.activated_layers": 1}}),
    ("phi3", {**PLAIN, "set": {"method.activated_layers": 3}}),
]


def only(model: torch.nn.Module, drawn: Iterable[int]) -> torch.nn.Module:
    """What a draw of the callback does."""
    chosen = set(drawn)
    for i, layer in enumerate(layers_of(model)):
        layer.requires_grad_(i in chosen)
    return model


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_its_worst_stage_is_the_model_with_those_layers_trained(family: str, fields: dict[str, Any]) -> None:
    asked = {"method": "lisa", **fields}
    numbers = [int(word) for word in read(tiny_job(family, asked)).case.method.stage.split() if word.isdigit()]
    assert_as_reference(family, asked, lambda model: only(model, range(numbers[0], numbers[-1] + 1)))


@pytest.mark.parametrize("fields", [{**PLAIN}, {**AGAIN}, {**PLAIN, "micro_batch": 1, "seq_len": 2}])
def test_no_draw_is_worse_than_the_worst_stage(fields: dict[str, Any]) -> None:
    job = tiny_job("llama", {"method": "lisa", **fields})
    peaks = [reference(job, partial(only, drawn=drawn)).peak_bytes for drawn in combinations(range(3), 2)]
    assert read(job).estimate.memory.peak_bytes == max(peaks)


@pytest.mark.parametrize("states", ["active", "all"])
def test_states_are_those_that_the_optimizer_of_the_callback_ends_with(states: str) -> None:
    """ms-swift draws before the optimizer is made over what trains, Axolotl after it was made over everything."""
    job = tiny_job("llama", {"method": "lisa", **PLAIN, "set": {"method.states": states, "method.activated_layers": 1}})
    model = build.base_model(build.decide(job.model_copy(update={"method": "full"})), "real")
    if states == "active":
        only(model, [1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.ones((1, 3), dtype=torch.int64)
    for layer in (0, 1, 2):
        only(model, [layer])(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert read(job).static["state"] == held


def test_the_paper_trains_embedding_head_and_two_layers() -> None:
    """Section 4: E+H+2L of LLaMA-2-7B; shapes of its config.json."""
    outside, layer = 2 * 32_000 * 4_096 + 4_096, 4 * 4_096**2 + 3 * 4_096 * 11_008 + 2 * 4_096
    assert estimate(make_job(model="llama-2-7b", method="lisa")).parameters.trainable == outside + 2 * layer


def test_the_answer_names_the_stage() -> None:
    job = make_job(model="llama-2-7b", method="lisa", micro_batch=1, set={"method.states": "all"})
    answer = estimate(job)
    stage = next(a for a in answer.assumptions if a.what == "stage")
    assert stage.value == "layers 30 to 31"
    assert "the lowest of 2 stages" in stage.why
    terms = {term.name: term for term in explain(job)}
    assert "6,738,415,616" in terms["optimizer states"].formula
    assert sum(term.bytes for term in terms.values()) == answer.memory.peak_bytes
    assert answer.memory.reserved_bytes is not None
    assert answer.memory.reserved_bytes >= answer.memory.peak_bytes - 2**21


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.activated_layers": 33}}, "the model has 32 layers"),
        ({"set": {"method.activated_layers": 0}}, "use 1 to 32"),
        ({"format": "nf4"}, "cannot train packed weights"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="lisa", **fields))
