"""The real optimizers that the trace can run, as a training loop meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from peftplan import methods, optimizers
from peftplan.errors import RequestError, Unsupported
from peftplan.job import Job
from peftplan.optimizers import Optimizer
from peftplan.optimizers.adafactor_torch import AdafactorTorch
from peftplan.optimizers.adagrad import Adagrad
from peftplan.optimizers.adalomo import AdaLomo
from peftplan.optimizers.adamw import AdamW
from peftplan.optimizers.lomo import Lomo
from peftplan.optimizers.rmsprop import RMSprop
from peftplan.optimizers.sgd import Sgd

IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "auto": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
"""`auto` is torch's own choice, on the CPU the for-loop."""
_RATE = 1e-4
Weights = Mapping[str, torch.nn.Parameter]


class Plain:
    """An optimizer of torch: backward, then a step over all weights."""

    def __init__(self, make: Callable[[list[Any]], Any], weights: Weights) -> None:
        self._inner = make(list(weights.values()))

    def backward(self, loss: Any) -> None:
        loss.backward()

    def step(self) -> None:
        self._inner.step()

    def zero_grad(self) -> None:
        self._inner.zero_grad(set_to_none=True)

    def states(self) -> Iterator[tuple[torch.nn.Parameter | None, str, Any]]:
        """(weight, key, tensor) of every state."""
        for weight, state in self._inner.state.items():
            yield from ((weight, key, value) for key, value in state.items())


class InBackward(Plain):
    """One for each weight, which steps when its gradient is there (torch's recipe, torchtune, GaLore's layer-wise)."""

    def __init__(self, make: Callable[[list[Any]], Any], weights: Weights) -> None:
        self._each = {weight: make([weight]) for weight in weights.values()}
        for weight in self._each:
            weight.register_post_accumulate_grad_hook(self._hook)

    def _hook(self, weight: torch.nn.Parameter) -> None:
        self._each[weight].step()
        self._each[weight].zero_grad(set_to_none=True)

    def step(self) -> None:
        """Nothing is left to do."""

    def zero_grad(self) -> None:
        """Nothing is left."""

    def states(self) -> Iterator[tuple[torch.nn.Parameter | None, str, Any]]:
        for weight, inner in self._each.items():
            yield from ((weight, key, value) for key, value in inner.state[weight].items())


class Fused(InBackward):
    """LOMO's, which run backward themselves."""

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        import lomo_optim

        self._lomo: Any = getattr(lomo_optim, name)(model, lr=_RATE)

    def backward(self, loss: Any) -> None:
        self._lomo.fused_backward(loss, _RATE)

    def states(self) -> Iterator[tuple[torch.nn.Parameter | None, str, Any]]:
        for kept in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"):
            yield from ((None, name, value) for name, value in getattr(self._lomo, kept, {}).items())


def make(job: Job, model: torch.nn.Module) -> Plain:
    """The real optimizer that `job` asks for, of all weights of `model` that train. Raises Unsupported for others."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    name = job.optimizer or (methods.aliases().get(job.method) and methods.optimizer_of(job.method)) or "adamw"
    asked = optimizers.make(name, job.knobs("optimizer"))
    if isinstance(asked, (Lomo, AdaLomo)):
        return Fused(type(asked).__name__, model)
    inner = _of_torch(asked)
    if inner is None:
        raise Unsupported(f"--optimizer: the trace cannot run {name!r}; it can: {', '.join(_RUNS)}")
    if not weights:
        raise RequestError(f"method {job.method!r} trains nothing on this model")
    return (InBackward if asked.in_backward else Plain)(inner, weights)


_RUNS = ("adamw", "sgd", "rmsprop", "adagrad", "adafactor_torch", "lomo", "adalomo")


def _of_torch(asked: Optimizer) -> Callable[[list[Any]], Any] | None:
    if isinstance(asked, AdamW) and not asked.master_weights:
        return _partly(torch.optim.AdamW, asked.impl, amsgrad=asked.amsgrad)
    if isinstance(asked, Sgd):
        own = {"momentum": asked.momentum, "nesterov": asked.nesterov, "weight_decay": asked.weight_decay}
        return _partly(torch.optim.SGD, asked.impl, **own)
    if isinstance(asked, RMSprop):
        own = {"momentum": asked.momentum, "centered": asked.centered, "weight_decay": asked.weight_decay}
        return _partly(torch.optim.RMSprop, asked.impl, **own)
    if isinstance(asked, Adagrad):
        return _partly(torch.optim.Adagrad, asked.impl, weight_decay=asked.weight_decay)
    if isinstance(asked, AdafactorTorch):
        return _partly(torch.optim.Adafactor, asked.impl)
    return None


def _partly(cls: Any, impl: str, **own: Any) -> Callable[[list[Any]], Any]:
    def of(weights: list[Any]) -> Any:
        return cls(weights, lr=_RATE, **IMPLEMENTATIONS[impl], **own)

    return of
