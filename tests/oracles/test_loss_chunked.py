"""Losses over pieces of a row, as torchtune and LitGPT compute them, on transformers' models."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from peftplan.instruments import build
from peftplan.pipeline import read
from tests.oracles.equal import AGAIN, PLAIN, WIDE, Row, assert_same, name, tiny_job
from tests.oracles.reference import reference

pytestmark = pytest.mark.trace
NO_CACHE = {"model.use_cache": False}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "method": "full", "set": {**NO_CACHE, "loss.style": "chunked"}}),
    ("llama", {**PLAIN, "method": "lora", "micro_batch": 1, "set": {**NO_CACHE, "loss.style": "chunked"}}),
    ("qwen2", {**WIDE, "method": "full", "micro_batch": 1, "set": {**NO_CACHE, "loss.style": "chunked"}}),
    ("gemma", {**AGAIN, "method": "lora", "set": {**NO_CACHE, "loss.style": "chunked"}}),
    ("llama", {**PLAIN, "method": "lora", "set": {**NO_CACHE, "loss.style": "split"}}),
    ("llama", {**PLAIN, "method": "full", "micro_batch": 1, "set": {**NO_CACHE, "loss.style": "split"}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_the_loss_is_what_its_library_does(
    family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftplan.graph.chunked_loss.TOKENS", 5)
    job = tiny_job(family, fields)
    forward = {"chunked": _torchtune, "split": _litgpt}[job.settings["loss.style"]]

    def patched(model: Any) -> torch.nn.Module:
        model.forward = MethodType(forward, model)
        model.requires_grad_(True)
        return model if job.method == "full" else build._adapt(model, build.decide(job))

    assert_same(reference(job, patched), read(job).estimate)


def _torchtune(model: Any, **batch: Any) -> CausalLMOutputWithPast:
    labels = batch.pop("labels")
    ignored = torch.full((labels.shape[0], 1), -100)
    labels = torch.hstack((labels[..., 1:], ignored))
    del ignored
    hidden = model.model(**batch)[0]
    logits = [model.lm_head(piece) for piece in hidden.chunk(8, dim=1)]
    total = (labels != -100).sum()
    parts = [part.reshape(-1) for part in labels.chunk(8, dim=1)]
    rows = [piece.reshape(-1, piece.size(-1)) for piece in logits]
    loss: Any = 0.0
    for scores, part in zip(rows, parts, strict=True):
        loss += functional.cross_entropy(scores.float(), part, reduction="sum")
    return CausalLMOutputWithPast(loss=loss / total)


def _litgpt(model: Any, **batch: Any) -> CausalLMOutputWithPast:
    targets = batch.pop("labels")[..., 1:]
    hidden = model.model(**batch)[0]
    logits = [model.lm_head(piece) for piece in hidden.split(5, dim=1)]
    logits[-1] = logits[-1][..., :-1, :]
    rows = [piece.reshape(-1, piece.size(-1)) for piece in logits]
    parts = [part.reshape(-1) for part in targets.split(5, dim=1)]
    losses = [functional.cross_entropy(s, t, reduction="none") for s, t in zip(rows, parts, strict=True)]
    counted = (targets != -100).sum()
    return CausalLMOutputWithPast(loss=torch.cat(losses).sum() / counted)
