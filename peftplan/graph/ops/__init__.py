"""Cost rules of the ops: what each keeps for backward, what its backward makes, what it computes.

Each class mirrors one autograd formula (torch/tools/autograd/derivatives.yaml, torch 2.13, and
torch/csrc/autograd/FunctionsManual.cpp) or one fused kernel; the docstring names it. `need` holds the names of values
that require a gradient.
"""

from __future__ import annotations

from peftplan.graph.ops.attention import FusedAttention, Softmax
from peftplan.graph.ops.collective import Collective, Whole
from peftplan.graph.ops.elementwise import (
    Activate,
    Add,
    AddConst,
    Div,
    Dropout,
    MeanLast,
    Mul,
    Rsqrt,
    Scale,
    Square,
    Squash,
)
from peftplan.graph.ops.ends import Embedding, LogSoftmax, NllLoss
from peftplan.graph.ops.experts import GatedHalves, GroupedLinear
from peftplan.graph.ops.float8 import Float8Linear
from peftplan.graph.ops.formula import Formula, Hooked
from peftplan.graph.ops.fused import Further, Fused
from peftplan.graph.ops.layout import Cast, Concat, Copy, Flattened, Part, RotateHalf, Slice, View, WeightCast
from peftplan.graph.ops.linear import BITSANDBYTES, PLAIN, DetachedLinear, Linear, MatMul, PackedLinear, Solve, Unpack
from peftplan.graph.ops.megatron import MainGradLinear
from peftplan.graph.ops.names import Hold, Keep, Make, internal

__all__ = [
    "BITSANDBYTES",
    "PLAIN",
    "Activate",
    "Add",
    "AddConst",
    "Cast",
    "Collective",
    "Concat",
    "Copy",
    "DetachedLinear",
    "Div",
    "Dropout",
    "Embedding",
    "Flattened",
    "Float8Linear",
    "Formula",
    "Further",
    "Fused",
    "FusedAttention",
    "GatedHalves",
    "GroupedLinear",
    "Hold",
    "Hooked",
    "Keep",
    "Linear",
    "LogSoftmax",
    "MainGradLinear",
    "Make",
    "MatMul",
    "MeanLast",
    "Mul",
    "NllLoss",
    "PackedLinear",
    "Part",
    "RotateHalf",
    "Rsqrt",
    "Scale",
    "Slice",
    "Softmax",
    "Solve",
    "Square",
    "Squash",
    "Unpack",
    "View",
    "WeightCast",
    "Whole",
    "internal",
]
