"""Layers whose checkpoints are packed, for the trace: those that the libraries themselves put in place of linear ones.

Nothing about packing is restated here: the libraries' own classes say what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from peftplan.errors import OutsideError


def _gptq(linear: torch.nn.Linear, knobs: Mapping[str, Any]) -> torch.nn.Module:
    """What optimum makes for transformers (gptq/quantizer.py), with the kernel that gptqmodel trains."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    made = TorchLinear(
        bits=int(knobs.get("bits", 4)),
        group_size=int(knobs.get("group_size", 128)),
        sym=bool(knobs.get("sym", True)),
        desc_act=bool(knobs.get("desc_act", False)),
        in_features=linear.in_features,
        out_features=linear.out_features,
        bias=linear.bias is not None,
    )
    made._init_wf_unsqueeze_buffers()
    return made


def _awq(linear: torch.nn.Linear, knobs: Mapping[str, Any]) -> torch.nn.Module:
    """What transformers makes (integrations/awq.py), with the kernel of operators of torch."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return AwqTorchLinear(
        bits=int(knobs.get("bits", 4)),
        group_size=int(knobs.get("group_size", 128)),
        sym=False,
        desc_act=False,
        in_features=linear.in_features,
        out_features=linear.out_features,
        bias=linear.bias is not None,
        register_buffers=True,
        dtype=torch.float16 if linear.weight.dtype is torch.float32 else linear.weight.dtype,
    )


FORMATS: dict[str, Callable[[torch.nn.Linear, Mapping[str, Any]], torch.nn.Module]] = {"gptq": _gptq, "awq": _awq}


def replace_linears(model: Any, fmt: str, knobs: Mapping[str, Any]) -> None:
    """Put packed layers in place of the linear ones of the decoder's layers. Raises OutsideError without the library.

    torch.compile is left out: compiled unpacking cannot be watched.
    """
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in path]
    for path, linear in linears:
        try:
            with torch.device(linear.weight.device):
                made = FORMATS[fmt](linear, knobs)
        except ImportError as error:
            raise OutsideError(f"format {fmt} needs a package: {error}") from error
        model.set_submodule(path, made.train())
    model.quantization_method = fmt
    if knobs.get("prepare", True):
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def is_packed(module: torch.nn.Module) -> bool:
    """Whether it is one of those layers."""
    return "qweight" in module._buffers


def numel(module: torch.nn.Module) -> int:
    """How many weights, and biases among its buffers, a layer stands for beside its parameters."""
    if not is_packed(module):
        return 0
    made: Any = module
    bias = module._buffers.get("bias")
    return int(made.in_features) * int(made.out_features) + (0 if bias is None else bias.numel())


def state_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that those layers hold: name and tensor."""
    for path, module in model.named_modules():
        if is_packed(module):
            yield from ((f"{path}.{name}", t) for name, t in module._buffers.items() if t is not None)
