"""IA3: keys, values and feed-forward activations times learned vectors (Liu 2022, arXiv:2205.05638, section 3.3).

Trains: one vector per adapted linear layer, `in` long for feed-forward modules, `out` long for the others; plus copies
of `modules_to_save`.
Keeps for backward: the layer's output (its input, in the vector's dtype, for feed-forward modules) and the vector.
Not modelled: packed bases where PEFT's forward hands on fp32 in place of the model's dtype; embeddings.
Mirrors peft/tuners/ia3/layer.py Linear.forward and peft/tuners/ia3/bnb.py Linear8bitLt and Linear4bit.forward, peft
0.21.2; defaults from peft/utils/constants.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PackedLinear
from peftplan.methods._linears import COMMON, adapt, packed, plan, sees_autocast
from peftplan.methods._saved import save_modules
from peftplan.methods.base import Family, Host, Method
from peftplan.methods.targets import Names, targets
from peftplan.units import DType

DEFAULTS = {
    "llama": ("k_proj", "v_proj", "down_proj"),
    "mistral": ("k_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "qwen3": ("q_proj", "v_proj", "down_proj"),
    "gemma": ("q_proj", "v_proj", "down_proj"),
    "mixtral": ("k_proj", "v_proj", "w2"),
}
"""TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING; the feed-forward one of each is the last (Mixtral's is no module
since transformers 5)."""
HARMLESS = COMMON | {"init_ia3_weights"}


@final
@dataclass(frozen=True)
class Ia3(Method):
    """PEFT's IA3Config."""

    target_modules: Names = None
    exclude_modules: Names = None
    feedforward_modules: Names = None
    modules_to_save: tuple[str, ...] | None = None
    family: ClassVar[Family] = "additive"

    def default_targets(self, family: str) -> Names:
        return DEFAULTS.get(family)

    def apply(self, graph: Graph, host: Host) -> Graph:
        family = host.arch.family
        wanted = self.default_targets(family) if self.target_modules is None else self.target_modules
        choice = targets(family, wanted, excluded=self.exclude_modules, saved=self.modules_to_save)
        feedforward = self._feedforward(family)
        planned = plan(graph, choice, lambda path: _is_feedforward(feedforward, path))

        def branch(module: Module, at_input: bool) -> tuple[Op, ...]:
            kernel = packed(module)
            if kernel is not None:
                return _packed(module, kernel, host, at_input=at_input)
            return _plain(module, host, at_input=at_input)

        return save_modules(adapt(graph, planned, branch, name="IA3"), self.modules_to_save)

    def _feedforward(self, family: str) -> str | tuple[str, ...]:
        given = self.feedforward_modules
        if given is None:
            if family not in DEFAULTS:
                raise RequestError(f"PEFT has no default feedforward_modules for {family}; set them, e.g. down_proj")
            return DEFAULTS[family][-1:]
        if isinstance(given, tuple) and isinstance(self.target_modules, tuple):
            for name in given:
                if name not in self.target_modules:
                    raise RequestError(f"method.feedforward_modules: {name!r} is not among --target-modules")
        return given


def _is_feedforward(wanted: str | tuple[str, ...], path: str) -> bool:
    """IA3Model._check_target_module_feedforward: a pattern for the whole name, or any of several endings."""
    return re.fullmatch(wanted, path) is not None if isinstance(wanted, str) else path.endswith(wanted)


def _scaling(b: Builder, module: Module, host: Host, *, at_input: bool) -> Tensor:
    """`1 * ia3_l.flatten()`."""
    shape = (1, module.in_features) if at_input else (module.out_features, 1)
    vector = b.weight("ia3_l", *shape, dtype=host.new_dtype, kind=ADAPTER)
    return b.scale(vector.view(vector.numel), label="ia3_scaling")


def _plain(module: Module, host: Host, *, at_input: bool) -> tuple[Op, ...]:
    b = Builder(host.numerics, f"{module.path}.")
    x = module.x
    with b.marked(module.site, "scale"):
        scaling = _scaling(b, module, host, at_input=at_input)
        if at_input:
            wide = b.cast(x, host.new_dtype, label="ia3_x")
            given = b.cast(b.mul(wide, scaling, label="ia3_scaled"), x.dtype, label="ia3_interm")
            ahead, b.ops = tuple(b.ops), []
            b.hold(scaling, wide, given, x)
            return (*ahead, *writing(module.ops, x, given), *b.ops)
        base = module.out._replace(name=f"{module.out.name}.base")
        ahead, b.ops = tuple(b.ops), []
        out = b.cast(b.mul(base, scaling, label="ia3_scaled"), base.dtype, label="out")
        b.hold(base, scaling, x)
    return (*ahead, *writing(module.ops, module.out, base), *writing(b.ops, out, module.out))


def _packed(module: Module, kernel: PackedLinear, host: Host, *, at_input: bool) -> tuple[Op, ...]:
    """bitsandbytes' modules: half-precision input is made fp32, and nothing is cast back."""
    b = Builder(host.numerics, f"{module.path}.")
    x = module.x
    if x.dtype is not DType.float32 and not (sees_autocast(host) and host.new_dtype is x.dtype):
        made = f"PEFT's IA3 makes the output of {module.path} float32 on this packed base"
        if host.numerics.autocast is None:
            raise RequestError(f"{made}, and the rest of the model refuses that; set format.prepare=true")
        raise Unsupported(f"{made}, which is not modelled under autocast; leave autocast out")
    with b.marked(module.site, "scale"):
        scaling = _scaling(b, module, host, at_input=at_input)
        given = b.mul(x, scaling, label="ia3_scaled") if at_input else x
        ends = at_input and not kernel.adapters_clone  # nothing comes after the layer's own product
        base = module.out if ends else module.out._replace(name=f"{module.out.name}.base")
        ahead, b.ops = tuple(b.ops), []
        b.hold(given)
        out = base if at_input else b.mul(base, scaling, label="ia3_scaled")
        out = b.copy(out, label="clone") if kernel.adapters_clone else out
        b.hold(base if kernel.adapters_clone and at_input else out, scaling, x)
    inner = writing(writing(module.ops, x, given), module.out, base)
    return (*ahead, *inner, *writing(b.ops, out, module.out))


METHOD = Ia3
EXAMPLES = (Ia3(), Ia3(target_modules=("k_proj", "up_proj", "down_proj"), feedforward_modules=("down_proj",)))
UNVERIFIED: dict[str, str] = {}
