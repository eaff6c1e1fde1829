"""Unsloth's checkpoints against a reference of them that runs without a GPU: what its function does, on a device that
the CPU stands for, with a host that the recorder does not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from torch.utils._python_dispatch import _disable_current_modes

from peftplan import estimate
from peftplan.instruments import recompute
from peftplan.job import Job
from peftplan.recompute.unsloth import LEAST_BYTES
from tests.oracles.equal import assert_equal, tiny_job
from tests.oracles.reference import layers_of

Run = Callable[..., Any]
SIZES = {"micro_batch": 3, "seq_len": 8192, "batching": "exact", "precision": "bf16"}
HIDDEN_BYTES = 3 * 8192 * 48 * 2


class Staged(torch.autograd.Function):  # type: ignore[misc]
    """A layer that runs again from an input that was on the host."""

    @staticmethod
    def forward(ctx: Any, run: Run, buffer: Any, hidden: Any) -> Any:
        ctx.run, ctx.buffer, ctx.shape = run, buffer, hidden.shape
        with _disable_current_modes(), torch.no_grad():
            ctx.held = hidden.clone().view(-1)
        with torch.no_grad():
            return run(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        hidden = ctx.buffer().copy_(ctx.held).view(ctx.shape).detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(hidden)
        torch.autograd.backward(out, gradient)
        return None, None, hidden.grad


def staged_layers(model: Any, job: Job) -> None:
    """All layers but the last in turns with two buffers; the last as CheckpointFunction does it."""
    full = job.model_copy(update={"recompute": "full", "settings": {"recompute.use_reentrant": True}})
    _checkpoint(model, full)
    for name in ("buffer_a", "buffer_b"):
        model.register_buffer(name, torch.empty(HIDDEN_BYTES // 2, dtype=torch.bfloat16), persistent=False)
    turns: Iterator[int] = count()

    def run(function: Run, hidden: Any) -> Any:
        name = "buffer_b" if next(turns) % 2 else "buffer_a"
        return Staged.apply(function, lambda: getattr(model, name), hidden)

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in list(layers_of(base))[:-1]:
        layer._gradient_checkpointing_func = run


_checkpoint = recompute.checkpoint_layers


@pytest.mark.trace
@pytest.mark.parametrize("until", ["step", "loss"])
@pytest.mark.parametrize("method", [{"method": "full"}, {"method": "lora", "rank": 4}], ids=str)
def test_equals_the_reference(method: dict[str, Any], until: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HIDDEN_BYTES > LEAST_BYTES
    monkeypatch.setattr(recompute, "checkpoint_layers", staged_layers)
    settings = {"model.use_cache": False, "loop.outputs_until": until}
    assert_equal("llama", {**SIZES, **method, "recompute": "unsloth", "set": settings})


def test_small_inputs_and_the_last_layer_stay() -> None:
    fields = {**SIZES, "method": "lora", "recompute": "unsloth"}
    assert (estimate(tiny_job("llama", fields)).memory.host_bytes or 0) == 2 * HIDDEN_BYTES
    short = estimate(tiny_job("llama", {**fields, "seq_len": 64}))
    full = {**fields, "seq_len": 64, "recompute": "full", "set": {"recompute.use_reentrant": True}}
    assert short.memory == estimate(tiny_job("llama", full)).memory
