"""What the trace puts around the libraries while a step runs: who is running, and answers that fakes lack."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peftplan.instruments.recorder import Recorder

NOISY = ("bitsandbytes", "transformers", "peft", "adapters", "torch._subclasses.fake_tensor")


@contextmanager
def module_hooks(recorder: Recorder, model: torch.nn.Module) -> Iterator[None]:
    """Tell the recorder which module of `model` is running."""
    names = {id(module): name for name, module in model.named_modules()}

    def before(module: Any, _args: Any) -> None:
        recorder.enter(names.get(id(module), ""))

    def after(_module: Any, _args: Any, _output: Any) -> None:
        recorder.leave()

    handles = (
        torch.nn.modules.module.register_module_forward_pre_hook(before),
        torch.nn.modules.module.register_module_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def checkpoint_hooks(recorder: Recorder, model: torch.nn.Module) -> Iterator[None]:
    """Tell the recorder when a checkpointed layer is being recomputed, and which."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def watch(name: str, checkpoint: Any) -> Any:
        def run(function: Any, *args: Any) -> Any:
            with recorder.layer(name):
                return function(*args)

        return lambda function, *args: checkpoint(functools.partial(run, function), *args)

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    }
    originals = {name: layer._gradient_checkpointing_func for name, layer in layers.items()}
    for name, layer in layers.items():
        layer._gradient_checkpointing_func = watch(name, originals[name])
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer._gradient_checkpointing_func = originals[name]


def node_names(loss: torch.Tensor) -> dict[int, str]:
    """Sequence number -> name (`MmBackward0`) of every autograd node below `loss`; reads no saved tensor."""
    names: dict[int, str] = {}
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node._sequence_nr() in names:
            continue
        names[node._sequence_nr()] = node.name()
        todo.extend(following for following, _ in node.next_functions)
    return names


@contextmanager
def as_if_real(recorder: Recorder, *, padded: bool) -> Iterator[None]:
    """Let transformers make masks on fake tensors as it does on real ones.

    Whether a batch holds padding is in the data that fakes lack. transformers 5 takes fake tensors for a compiler's
    besides and then never leaves a mask out.
    """
    import transformers
    import transformers.masking_utils as masks

    if int(transformers.__version__.partition(".")[0]) < 5:  # all it reads is whether no token is padding
        recorder.answers["transformers/masking_utils.py"] = not padded
        yield
        return
    originals = (masks.is_tracing, masks.fast_all)

    def not_tracing(_tensor: Any = None) -> bool:
        return False

    def none_padded(tensor: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = originals[1](tensor)
        recorder.know(answer, not padded)
        return answer

    masks.is_tracing, masks.fast_all = not_tracing, none_padded
    try:
        yield
    finally:
        masks.is_tracing, masks.fast_all = originals


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings and log lines off stderr."""
    import transformers  # noqa: F401  (its import sets its logger's level)

    loggers = [logging.getLogger(name) for name in NOISY]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
