"""The feed-forward half of a layer."""

from __future__ import annotations

from peftplan.arch.core import Mlp
from peftplan.graph.blocks.modules import project
from peftplan.graph.blocks.setup import Setup
from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor


def gated(b: Builder, m: Mlp, setup: Setup, h: Tensor) -> Tensor:
    """LlamaMLP.forward: down(act(gate(x)) * up(x)); Phi3MLP.forward with one fused projection."""
    types, batch, size = setup.types, setup.batch, setup.mesh.part(m.size)
    hidden = h.shape[-1]
    if m.fused_gate_up:
        both = project(b, h, 2 * m.size, label="gate_up_proj", site="gate_up", types=types)
        gate, up = (b.slice(both, batch.size, batch.seq, m.size, label=n) for n in ("gate", "up"))
        product = setup.kernels.glu_of_halves(b, gate, up)
        d = project(b, product, hidden, label="down_proj", site="down", types=types)
        b.hold(both, product)
        return d
    product = setup.kernels.glu(
        b,
        lambda: project(b, h, size, label="gate_proj", site="gate", types=types, biased=m.bias),
        lambda: project(b, h, size, label="up_proj", site="up", types=types, biased=m.bias),
    )
    return project(b, product, hidden, label="down_proj", site="down", types=types, biased=m.bias)
