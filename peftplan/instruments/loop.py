"""The training step that every instrument runs: a plain loop's, with hooks for whoever watches.

`outputs = model(**batch); outputs.loss.backward(); optimizer.step(); optimizer.zero_grad()`. `loop.outputs_until` says
how long the loop holds the model's outputs (see `trace`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftplan.instruments import optim
from peftplan.instruments.build import Choices

_PINNED = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
}
_TASKS = ("multitask_prompt_tuning", "poly")
"""Methods whose batch says which task each sequence is of."""


@contextmanager
def _pinned(kernel: Any) -> Iterator[None]:
    with sdpa_kernel(kernel), repeated_heads() if kernel is SDPBackend.EFFICIENT_ATTENTION else nullcontext():
        yield


@contextmanager
def repeated_heads() -> Iterator[None]:
    """Inside, transformers repeats keys and values for grouped queries: the memory-efficient kernel takes no groups."""
    from transformers.integrations import sdpa_attention

    original = sdpa_attention.use_gqa_in_sdpa
    sdpa_attention.use_gqa_in_sdpa = lambda *_args, **_kwargs: False
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = original


class Loop:
    """Model, optimizer and batch of one job on `device`, in training mode. Subclasses watch."""

    def __init__(self, choices: Choices, model: torch.nn.Module, device: torch.device) -> None:
        self.choices = choices
        self.job = choices.job
        self.model = model
        self.device = device
        self.seq_len = choices.seq_len
        self.optimizer = self._optimizer()
        self.held: Any = None
        self._allocates = choices.method == "adalora" and choices.job.knobs("method").get("update_and_allocate", True)

    # -- what a watcher may want to know ------------------------------------------------------------------------------

    def phase(self, name: str) -> None:
        """The phase `name` begins: forward, loss, backward or optimizer."""

    def label(self, tensor: torch.Tensor, kind: str, name: str) -> None:
        """What `tensor` turned out to be: a `parameter`, a `gradient` or part of the `batch`."""

    # -- the step -----------------------------------------------------------------------------------------------------

    def _optimizer(self) -> optim.Plain:
        return optim.make(self.job, self.model)

    def _step(self) -> None:
        """One micro-batch and the optimizer's step."""
        kept = self._micro_step()
        self.phase("optimizer")
        self._clip()
        self.optimizer.step()
        if self._allocates:
            self.model.base_model.update_and_allocate(0)  # a step before ranks are cut
        self.optimizer.zero_grad()
        del kept

    def _clip(self) -> None:
        """All gradients together to the job's norm, where it has one."""
        norm = self.job.knobs("loop").get("max_grad_norm", 0)
        if norm:
            torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], norm)

    def _micro_step(self) -> tuple[Any, ...]:
        """Forward and backward; returns what a loop's variables keep alive: batch, loss, outputs."""
        self.phase("forward")
        batch = self._batch()
        outputs = self._forward(batch)
        self.held = outputs if self.choices.outputs_until == "next" else None
        loss = outputs.loss
        if self.choices.outputs_until != "step":
            outputs = None
        self.phase("backward")
        self.optimizer.backward(loss)
        for name, param in self.model.named_parameters():
            if param.grad is not None:
                self.label(param.grad, "gradient", name)
        return batch, loss, outputs

    def _forward(self, batch: dict[str, torch.Tensor]) -> Any:
        """The model's outputs, under the job's autocast."""
        dtype = self.choices.autocast
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype):
            return self.model(**batch)

    def _batch(self) -> dict[str, torch.Tensor]:
        """Token 1 everywhere; the last token of a padded batch is padding."""
        shape = (self.job.micro_batch, self.seq_len)
        ids = torch.ones(shape, dtype=torch.int64, device=self.device)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.choices.padded or self.choices.hub:
            batch["attention_mask"] = torch.ones(shape, dtype=torch.int64, device=self.device)
        if self.choices.padded:
            batch["attention_mask"][-1, -1:] = 0
        if self.choices.method in _TASKS:
            batch["task_ids"] = torch.zeros(self.job.micro_batch, dtype=torch.int64, device=self.device)
        for name, tensor in batch.items():
            self.label(tensor, "batch", name)
        return batch

    def _kernels(self) -> AbstractContextManager[None]:
        """The attention kernel that the job pins."""
        pinned = _PINNED.get(self.choices.attention)
        if pinned is None or (self.device.type == "cpu" and pinned is not SDPBackend.MATH):
            return nullcontext()
        return _pinned(pinned)

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Inside, the model's loss function begins the phase `loss`."""
        base: Any = self.model.get_base_model() if self.choices.wrapped else self.model
        loss_function = base.loss_function

        def loss(*args: Any, **kwargs: Any) -> Any:
            self.phase("loss")
            return loss_function(*args, **kwargs)

        base.loss_function = loss
        try:
            yield
        finally:
            base.loss_function = loss_function
