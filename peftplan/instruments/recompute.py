"""Turning on each recompute policy on the real model, with the libraries' own switches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from peftplan import recompute
from peftplan.errors import Unsupported
from peftplan.instruments import adapterhub, host
from peftplan.job import Job
from peftplan.recompute import Recompute
from peftplan.recompute.every_n import EveryN
from peftplan.recompute.full import Full
from peftplan.recompute.selective import Selective
from peftplan.recompute.unsloth import Unsloth

_OPERATORS = {
    "mm": (torch.ops.aten.mm.default,),
    "addmm": (torch.ops.aten.addmm.default,),
    "bmm": (torch.ops.aten.bmm.default,),
    "attention": (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
    ),
}


def of(job: Job) -> Recompute:
    """The policy that a job asks for."""
    return recompute.make(job.recompute or "none", job.knobs("recompute"), offload=job.offload)


def checkpoint_layers(model: torch.nn.Module, job: Job) -> None:
    """Turn recomputation on the way transformers does."""
    policy = of(job)
    if isinstance(policy, Unsloth):
        raise Unsupported("--recompute unsloth: the trace cannot run Unsloth's checkpoints, which need a GPU")
    if adapterhub.belongs(job.method):
        if type(policy) is not Full or policy.offload:
            raise Unsupported(f"--recompute {job.recompute}: the trace of an AdapterHub method knows none and full")
        adapterhub.checkpoint_layers(model, job)
        return
    base: Any = getattr(model, "base_model", model)
    reentrant = job.knobs("recompute").get("use_reentrant")
    kwargs: dict[str, Any] = {} if reentrant is None else {"use_reentrant": bool(reentrant)}
    beside: dict[str, Any] = {}
    if isinstance(policy, EveryN):
        beside["every_n_layers"] = policy.every_n
    if isinstance(policy, Selective):
        kwargs = {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(_choosing(policy))}
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None, **beside)
    if policy.offload:
        _offload_inputs(model)


def _offload_inputs(model: torch.nn.Module) -> None:
    """What `activation_checkpointing_enable(offload=True)` puts around each checkpoint, with a host apart from the
    device that the CPU stands for here."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def around(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with host.saved():
                return checkpoint(*args)

        return run

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer._gradient_checkpointing_func = around(layer._gradient_checkpointing_func)


def _choosing(policy: Selective) -> Callable[..., CheckpointPolicy]:
    """torch's policy function for one layer's run."""
    saved = {operator for name in policy.save for operator in _OPERATORS[name]}
    products = 0

    def choose(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        nonlocal products
        products += operator in _OPERATORS["mm"]
        again = policy.every_second_mm and operator in _OPERATORS["mm"] and products % 2 == 0
        keeps = operator in saved and not again
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return choose
