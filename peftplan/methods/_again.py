"""A projection of a layer once more, on another input: what runs a module that the layer runs as well."""

from __future__ import annotations

from dataclasses import replace

from peftplan.graph.builder import Builder
from peftplan.graph.core import Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import DetachedLinear, PackedLinear
from peftplan.methods._branches import bias_of
from peftplan.methods.base import Host


def project(b: Builder, module: Module, x: Tensor, host: Host, label: str) -> Tensor:
    """The module's output for `x`, as its format computes it."""
    if module.weight.stored_bytes is None:
        return b.linear(x, module.weight, bias_of(module), label=label)
    ops, out = _packed(b, module, x, host, label)
    b.ops += ops
    return out


def project_unused(b: Builder, module: Module, x: Tensor, host: Host, label: str) -> Tensor:
    """The same where nobody reads the output: its node dies, and nothing is kept for a gradient."""
    if module.weight.stored_bytes is None:
        return b.detached_linear(b.autocast(x), b.autocast(module.weight), label)
    ops, out = _packed(b, module, x, host, label)
    b.ops += (_detached(op) if isinstance(op, PackedLinear) else op for op in ops)
    return out


def _packed(b: Builder, module: Module, x: Tensor, host: Host, label: str) -> tuple[tuple[Op, ...], Tensor]:
    """The ops of the format's stand-in, and its output; a format names them after the weight, so it gets a new name."""
    path = b.name(label)
    given = module.weight._replace(name=f"{path}.weight", stored_bytes=None)
    plain = Builder(host.numerics)
    with plain.marked(module.site):
        out = plain.linear(x, given, bias_of(module), label=path, autocast=False)
    made = writing(host.packs(tuple(plain.ops)), given, module.weight)
    return tuple(replace(op, part="extra") for op in made), out


def _detached(op: PackedLinear) -> Op:
    work = op.forward_workspace_bytes
    return DetachedLinear(name=op.name, ins=op.ins, out=op.out, site=op.site, part=op.part, temporary_bytes=work)
