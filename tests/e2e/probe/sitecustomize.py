"""Put on PYTHONPATH, tells what a training run really does, whoever runs it; nothing but torch is asked.

PEFTPLAN_PROBE=FOLDER: after every optimizer step, FOLDER/rank<N>.json says steps, losses, the model's parameters
(count, trained, classes, dtypes), the optimizer's class and state bytes, and the process group.
PEFTPLAN_CPU_ACCEL=1: accelerate takes the CPU for the accelerator it was configured for, so that FSDP2 and DeepSpeed
are not replaced by DDP. Where tensors live changes; which strategy runs does not.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
from collections.abc import Callable
from typing import Any

AFTER_IMPORT: dict[str, Callable[[Any], None]] = {}
"""{module: what to do once it is imported}."""


class _Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in AFTER_IMPORT:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, AFTER_IMPORT.pop(name))
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, then: Callable[[Any], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        self._then(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


# -- the CPU as the accelerator --------------------------------------------------------------------------------


def _state(state: Any) -> None:
    own = state.PartialState._prepare_backend

    def prepare(self: Any, cpu: bool, use_sagemaker_dp: bool = False, backend: str | None = None) -> Any:
        if int(os.environ.get("LOCAL_RANK", "-1")) == -1 or cpu:
            return own(self, cpu, use_sagemaker_dp, backend)
        asked = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")
        sharded = any(os.environ.get(name, "false").lower() == "true" for name in asked)
        kinds = state.DistributedType
        return "gloo", kinds.MULTI_GPU if sharded else kinds.MULTI_CPU

    state.PartialState._prepare_backend = prepare


def _arguments(training_args: Any) -> None:
    training_args.is_torch_bf16_gpu_available = lambda: True


def _meshes(parallelism: Any) -> None:
    own = parallelism.ParallelismConfig.build_device_mesh
    parallelism.ParallelismConfig.build_device_mesh = lambda self, *_, **__: own(self, "cpu")


if os.environ.get("PEFTPLAN_CPU_ACCEL"):
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    os.environ["ACCELERATE_USE_CPU"] = "false"
    AFTER_IMPORT["accelerate.state"] = _state
    AFTER_IMPORT["accelerate.parallelism_config"] = _meshes
    AFTER_IMPORT["transformers.training_args"] = _arguments

# -- the probe -------------------------------------------------------------------------------------------------


def _watch(optimizers: Any) -> None:
    """`torch.optim.optimizer` is imported: from now on every optimizer's step reports."""
    import torch

    losses: list[float] = []
    steps: dict[int, int] = {}
    backward = torch.Tensor.backward

    def watched(self: Any, *rest: Any, **named: Any) -> Any:
        if self.numel() == 1:
            losses.append(float(self.detach()))
        return backward(self, *rest, **named)

    def stepped(optimizer: Any, *_: Any) -> None:
        steps[id(optimizer)] = steps.get(id(optimizer), 0) + 1
        _write({"steps": max(steps.values()), "losses": losses, **_optimizer(optimizer), **_model(), **_group()})

    torch.Tensor.backward = watched
    optimizers.register_optimizer_step_post_hook(stepped)


def _optimizer(optimizer: Any) -> dict[str, Any]:
    import torch

    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [_here(value) for value in states if isinstance(value, torch.Tensor)]
    apart = {tensor.data_ptr(): tensor for tensor in tensors}  # bitsandbytes' tables are shared
    return {
        "optimizer": type(optimizer).__name__,
        "optimizer_state_bytes": sum(t.numel() * t.element_size() for t in apart.values()),
        "optimized": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
    }


def _here(tensor: Any) -> Any:
    """What this rank holds of it."""
    return tensor.to_local() if type(tensor).__name__ == "DTensor" else tensor


def _model() -> dict[str, Any]:
    """Facts of the largest module alive."""
    import gc
    from collections import Counter

    import torch

    modules: list[Any] = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Module)]
    root = max(modules, key=lambda module: sum(1 for _ in module.parameters()), default=None)
    parameters = [] if root is None else list(root.parameters())
    trained = [p for p in parameters if p.requires_grad]
    flags = (m for m in modules if type(m).__name__.endswith("ForCausalLM"))
    return {
        "parameters": sum(_numel(p) for p in parameters),
        "trainable": sum(_numel(p) for p in trained),
        "classes": dict(Counter(type(p).__name__ for p in parameters)),
        "dtypes": dict(Counter(str(p.dtype).partition(".")[2] for p in parameters)),
        "trainable_dtypes": dict(Counter(str(p.dtype).partition(".")[2] for p in trained)),
        "checkpointing": any(getattr(m, "is_gradient_checkpointing", False) for m in flags),
    }


def _numel(parameter: Any) -> int:
    """DeepSpeed's ZeRO-3 leaves an empty tensor in place of what other ranks hold."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _group() -> dict[str, Any]:
    import torch.distributed as group

    alive = group.is_available() and group.is_initialized()
    state = sys.modules.get("accelerate.state")
    kind = state.PartialState._shared_state.get("distributed_type") if state else None
    return {
        "world": group.get_world_size() if alive else 1,
        "backend": group.get_backend() if alive else None,
        "distributed_type": None if kind is None else str(getattr(kind, "value", kind)),
    }


def _write(facts: dict[str, Any]) -> None:
    import json

    place = os.path.join(os.environ["PEFTPLAN_PROBE"], f"rank{os.environ.get('RANK', '0')}.json")
    with open(place + ".part", "w") as file:
        json.dump(facts, file)
    os.replace(place + ".part", place)


if os.environ.get("PEFTPLAN_PROBE"):
    AFTER_IMPORT["torch.optim.optimizer"] = _watch
if AFTER_IMPORT:
    sys.meta_path.insert(0, _Hook())
