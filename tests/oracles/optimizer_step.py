"""Real optimizers on a tiny model's weights: the bytes of their states, and what their step makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from peftplan import optimizers
from peftplan.instruments.answer import levels
from peftplan.instruments.recorder import Recorder
from peftplan.optimizers.base import Trained
from peftplan.units import parse_dtype

LAYERS = 3
WIDTH, KV, FFN, VOCAB = 64, 24, 176, 97
_LAYER = {
    "self_attn.q_proj.weight": (WIDTH, WIDTH),
    "self_attn.k_proj.weight": (KV, WIDTH),
    "self_attn.v_proj.weight": (KV, WIDTH),
    "self_attn.v_proj.bias": (KV,),
    "self_attn.o_proj.weight": (WIDTH, WIDTH),
    "mlp.up_proj.weight": (FFN, WIDTH),
    "mlp.down_proj.weight": (WIDTH, FFN),
    "input_layernorm.weight": (WIDTH,),
}
"""In the order that a model has them; both tall and wide matrices, awkward sizes, and some below 4,096 elements."""

Named = dict[str, Any]
Make = Callable[[Named], Any]
"""Given named weights, the real optimizer."""


class Bytes(NamedTuple):
    states: int
    step: int


def trained(dtype: str) -> list[Trained]:
    """The weights as an estimate sees them: equal layers once."""
    kind = parse_dtype(dtype)
    layer = [Trained(shape, kind, LAYERS, f"model.layers.0.{name}", 1) for name, shape in _LAYER.items()]
    ends = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    first, *last = (
        Trained(shape, kind, 1, name, run) for run, (name, shape) in zip((0, 2, 3), ends.items(), strict=True)
    )
    return [first, *layer, *last]


def predicted(name: str, knobs: dict[str, Any], dtype: str) -> Bytes:
    """What the plug-in says of the tiny model on the CPU."""
    optimizer, weights = optimizers.make(name, knobs), trained(dtype)
    states = sum(state.bytes * state.copies for state in optimizer.states(weights, "cpu"))
    return Bytes(states, optimizer.step_bytes(weights, "cpu"))


def measured(make: Make, dtype: str, *, steps: int = 2) -> Bytes:
    """What the real optimizer holds after some steps, and the most that one more adds while it runs."""
    torch.manual_seed(0)
    weights = named_weights(dtype)
    optimizer = make(weights)
    for _ in range(steps):
        _give_gradients(weights.values())
        optimizer.step()
    _give_gradients(weights.values())
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in state_tensors(optimizer)}
    return Bytes(sum(held.values()), _recorded(optimizer, weights.values()))


def named_weights(dtype: str) -> Named:
    """The same weights as the model's parameters: layer by layer."""
    names: dict[str, tuple[int, ...]] = {}
    for w in as_listed(trained(dtype)):
        names[w.name] = w.shape
    return {name: torch.nn.Parameter(torch.randn(shape, dtype=getattr(torch, dtype))) for name, shape in names.items()}


def as_listed(weights: Sequence[Trained]) -> Iterator[Trained]:
    """Every weight by itself, layer by layer."""
    layer = [w for w in weights if w.copies > 1]
    yield from (w for w in weights if w.run == 0)
    for i in range(LAYERS):
        yield from (w._replace(copies=1, name=w.name.replace(".0.", f".{i}.")) for w in layer)
    yield from (w for w in weights if w.run > 1)


def _give_gradients(weights: Any) -> None:
    for weight in weights:
        weight.grad = torch.randn_like(weight)


def _recorded(optimizer: Any, weights: Iterable[Any]) -> int:
    recorder = Recorder()
    _add(recorder, (t for weight in weights for t in (weight, weight.grad)))
    _add(recorder, state_tensors(optimizer))
    _add(recorder, _counters(optimizer))
    before = len(recorder.events)
    recorder.phase = "optimizer"
    with recorder:
        optimizer.step()
    heights = list(levels(recorder.events))
    return max(heights[before - 1 :]) - heights[before - 1]


def _add(recorder: Recorder, tensors: Iterable[Any]) -> None:
    """Nothing here may hold them while the step runs."""
    for tensor in tensors:
        recorder.add(tensor, "known", "")


def _counters(optimizer: Any) -> Iterator[Any]:
    """What a group keeps for all its weights."""
    for inner in getattr(optimizer, "optimizers", [optimizer]):
        yield from (v for group in inner.param_groups for v in group.values() if isinstance(v, torch.Tensor))


def state_tensors(optimizer: Any) -> Iterator[Any]:
    """Every tensor an optimizer keeps: in its states, in objects there, inside tensor subclasses."""
    for inner in getattr(optimizer, "optimizers", [optimizer]):
        yield from _inside(list(inner.state.values()))
        yield from (t for group in inner.param_groups for t in _inside(list(group.get("state", {}).values())))


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        yield from (getattr(value, part) for part in parts)
        if not parts:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _inside(item)
    elif isinstance(value, dict):
        yield from _inside([v for k, v in value.items() if k != "group"])
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _inside(list(vars(value).values()))
