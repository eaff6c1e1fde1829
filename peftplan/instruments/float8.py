"""torchao's float8 training put into a model."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from peftplan.errors import OutsideError
from peftplan.graph.float8 import MULTIPLE


def convert(model: torch.nn.Module) -> None:
    """The layers' linear modules become Float8Linear where the kernel takes their weight's sides."""
    try:
        torchao: Any = importlib.import_module("torchao.float8")
    except ImportError as error:
        raise OutsideError("--precision fp8 needs a package: pip install torchao") from error

    def takes(module: torch.nn.Linear, name: str) -> bool:
        return not any(side % MULTIPLE for side in module.weight.shape) and not name.endswith("lm_head")

    torchao.convert_to_float8_training(model, module_filter_fn=takes)
