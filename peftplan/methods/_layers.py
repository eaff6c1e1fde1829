"""Methods that train weights of the base as they are: whole layers, and what lies outside of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peftplan.arch.core import Arch
from peftplan.errors import RequestError
from peftplan.graph.core import Graph, Region, Tensor
from peftplan.graph.edit import split_runs, train

_OUTSIDE = {"model.norm": "norm.weight", "lm_head": "@lm_head.weight", "model.embed_tokens": "@embed_tokens.weight"}


def train_layers(
    graph: Graph, layers: Callable[[int], bool], outside: Callable[[Tensor], bool], *, method: str
) -> Graph:
    """The graph with all weights of the layers that `layers` picks trained, those outside of the layers as `outside`
    says, and the rest frozen. Raises RequestError where a packed weight would train."""

    def wanted(region: Region, weight: Tensor) -> bool:
        return outside(weight) if region.first_index is None else layers(region.first_index)

    return refuse_packed(train(split_runs(graph, layers), wanted), method)


def outside(modules: Sequence[str], arch: Arch) -> Callable[[Tensor], bool]:
    """Whether a weight outside of the layers is that of one of `modules`. Raises RequestError."""
    unknown = [name for name in modules if name not in _OUTSIDE]
    if unknown:
        raise RequestError(f"method.train: {unknown[0]!r} is not one of {', '.join(_OUTSIDE)}")
    names = {_OUTSIDE[name] for name in modules}
    if arch.tied and "@lm_head.weight" in names:
        names.add("@embed_tokens.weight")
    return lambda weight: weight.name in names


def refuse_packed(graph: Graph, method: str) -> Graph:
    """The graph itself. Raises RequestError where a packed weight would train."""
    packed = next((w for w, _ in graph.params() if w.trainable and w.stored_bytes is not None), None)
    if packed is not None:
        raise RequestError(
            f"method {method} cannot train packed weights ({packed.name.removeprefix('@')}); use an adapter method "
            "such as lora, or an unquantized --format"
        )
    return graph


def check_layers(name: str, count: int, total: int, least: int = 1) -> None:
    """A number of layers. Raises RequestError."""
    if not least <= count <= total:
        raise RequestError(f"method.{name}={count}: the model has {total} layers; use {least} to {total}")


def every(weight: Tensor) -> bool:
    del weight
    return True
