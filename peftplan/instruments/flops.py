"""FLOPs of an operator, by torch's own formulas (`torch.utils.flop_counter`, 1 MAC = 2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)


def _transposed_product(a: Any, b: Any, *_: Any, out_val: Any) -> int:
    """(n, k) times (m, k)."""
    del out_val
    return 2 * int(a.shape[0]) * int(a.shape[1]) * int(b.shape[0])


def _grouped(a: torch.Tensor, b: torch.Tensor, *_args: Any, out_val: Any = None, **_kwargs: Any) -> int:
    """Rows of `a` times the matrix of their group, or columns times rows of one group: each row once."""
    del out_val
    return 2 * int(a.numel()) * int(b.shape[-1])


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
    _aten._int_mm: flop_registry[_aten.mm],
    _aten._weight_int8pack_mm: _transposed_product,
    _aten._grouped_mm: _grouped,
}
"""torch leaves out the CPU's flash attention, which counts like the GPU's: 2 products forward, 5 back, uncut; products
of whole numbers, which count like others; and the product in groups, as the products that it stands for."""


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """FLOPs of one call, None without a formula. Raises RuntimeError for products of unlike element types."""
    formula = FLOP_FORMULAS.get(func.overloadpacket)
    if formula is None:
        return None
    _check_dtypes(func, args)
    return formula(*args, **kwargs, out_val=out)


def _check_dtypes(func: Any, args: Any) -> None:
    """Refuse what a real kernel refuses and a fake one lets pass: products of unlike element types."""
    if func.overloadpacket in _PRODUCTS:
        kinds = {tensor.dtype for tensor in args[:3] if isinstance(tensor, torch.Tensor)}
        if len(kinds) > 1:
            raise RuntimeError(f"{func} of unlike dtypes: {', '.join(sorted(map(str, kinds)))}")


@functools.cache
def looks_heavy(op: str) -> bool:
    """Whether an operator's name promises products."""
    name = op.split(".")[1]
    return "mm" in name or "matmul" in name or "attention" in name
