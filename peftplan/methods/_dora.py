"""DoRA's branch: a learned magnitude per output times the direction of W + BA (Liu 2024, arXiv:2402.09353, equation 5).

Mirrors peft/tuners/lora/variants.py DoraLinearVariant.forward and peft/tuners/lora/dora.py DoraLinearLayer.forward,
peft 0.21.2. The norm of W + BA is detached: BA is made once more from an identity matrix, and that graph dies with the
forward. Where a layer is checkpointed, the first forward lets go of the identity earlier than is said here: the peak of
the forward errs high then, that of the step does not.
"""

from __future__ import annotations

from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor
from peftplan.methods._linears import unpacked
from peftplan.methods._lora import Branch


def dora(b: Builder, branch: Branch) -> Tensor:
    """`result + lora_magnitude_vector(x, ...)`, not yet cast to the base's dtype."""
    site, base, x = branch.module.site, branch.base, branch.x
    with b.marked(site, "extra"):
        given = b.dropout(x, branch.dropout)
        a, up = b.autocast(branch.a), b.autocast(branch.up)
        norm, locals_ = _norm(b, branch, given, a, up)
        magnitude = branch.weight(b, "lora_magnitude_vector.weight", norm.shape[0], dtype=branch.a.dtype)
        scale = b.div(magnitude, norm, label="mag_norm_scale").view(1, norm.shape[0])
    with b.marked(site, "down"):
        down = b.linear(given, a, label="lora_A")
    with b.marked(site, "up"):
        delta = b.linear(down, up, label="lora_B")
    with b.marked(site, "extra"):
        straight = _base(b, branch, given, locals_[-1])
        kept = b.mul(b.add_const(scale, label="scale_minus_1"), straight, label="kept")
        added = b.scale(b.mul(scale, delta, label="scaled"), label="added")
        out = b.add(kept, added, label="dora")
        b.hold(*locals_, norm, scale, delta, straight)
        total = b.add(base, out, label="sum")
        b.hold(base, given, x, branch.module.x)
        return total


def _base(b: Builder, branch: Branch, x: Tensor, weight: Tensor) -> Tensor:
    """The base's output without its bias; made anew from the dropped-out input where there is dropout."""
    if branch.dropout:
        return b.linear(x, weight, label="dora_base")
    biases = (t for op in branch.module.ops for t in op.ins if t.is_param and len(t.shape) == 1)
    bias = next(biases, None)
    return branch.base if bias is None else b.add(branch.base, bias, label="without_bias")


def _norm(b: Builder, branch: Branch, x: Tensor, a: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The norm of each row of W + scaling BA, and what DoraLinearLayer.forward holds, the last being W in x's dtype."""
    wide, out = a.shape[1], up.shape[0]
    eye = b.plain("eye", wide, wide, dtype=branch.a.dtype)
    given = b.cast(eye, a.dtype, label="eye_cast")
    down = b.detached_linear(given, a, label="eye_A")
    product = b.detached_linear(down, up, label="eye_BA")
    b.hold(eye)
    product = b.cast(product.view(out, wide), x.dtype, label="lora_weight")
    weight = b.cast(unpacked(b, branch.module), x.dtype, label="dora_weight")
    scaled = b.plain("scaled_weight", out, wide, dtype=x.dtype, ins=(product,))
    total = b.plain("weight_sum", out, wide, dtype=x.dtype, ins=(weight, scaled))
    norm = b.plain("weight_norm", out, dtype=x.dtype, ins=(total,))
    kept = (given, down) if branch.trains else ()  # by the graph of BA
    return norm, (*kept, product, weight)
