"""What the families with experts share: which layers have them, which options of theirs are not modelled."""

from __future__ import annotations

from collections.abc import Sequence

from peftplan.arch.config import Config, show
from peftplan.arch.core import ExpertsImplementation

KEYS = ("num_experts_per_tok", "output_router_logits", "router_aux_loss_coef", "experts_implementation")


def top_k(config: Config, default: int, *, of: int) -> int:
    """`num_experts_per_tok`, at most as many as there are."""
    value = config.size("num_experts_per_tok", default)
    if value > of:
        raise config.wrong(f"num_experts_per_tok is {value}, but there are {of} experts")
    return value


def implementation(config: Config) -> ExpertsImplementation:
    """`experts_implementation`: grouped_mm unless said otherwise, on every device (transformers 5.23,
    modeling_utils.py, get_correct_experts_implementation)."""
    if config.flag("output_router_logits", False):
        raise config.unsupported("output_router_logits (the router's auxiliary loss) is not modelled; set it to false")
    value = config.values.get("experts_implementation")
    if value in (None, "grouped_mm"):
        return "grouped_mm"
    raise config.unsupported(f"experts_implementation {show(value)} is not modelled; modelled: grouped_mm")


def sparse_layers(config: Config) -> Sequence[bool]:
    """For each layer whether it has experts: every `decoder_sparse_step`-th that is not in `mlp_only_layers`."""
    step = config.size("decoder_sparse_step", 1)
    dense = config.entries("mlp_only_layers") or []
    if any(isinstance(index, bool) or not isinstance(index, int) for index in dense):
        raise config.wrong(f"mlp_only_layers must be a list of layers' numbers, not {show(dense)}")
    return [(index + 1) % step == 0 and index not in dense for index in range(config.depth)]
