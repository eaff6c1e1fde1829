"""Putting one branch on each chosen linear layer: what most adapters share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Graph, Op, Region, Tensor
from peftplan.graph.edit import Module, Rewriter, rewrite, split_runs, train, writing
from peftplan.graph.ops import BITSANDBYTES, PLAIN, Cast, Hold, Make, PackedLinear, Unpack
from peftplan.methods.base import Host
from peftplan.methods.targets import Targets, chosen_paths, full_path
from peftplan.units import DType

S = TypeVar("S")
COMMON = frozenset(
    {
        "task_type", "inference_mode", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
        "revision", "fan_in_fan_out", "layers_pattern",
    }
)  # fmt: skip
"""Settings of every PEFT config that memory does not feel."""
BACKENDS = frozenset({"hqq", "gptq", "awq", "aqlm"})
"""Packed layers besides bitsandbytes' that peft 0.21.2 takes wherever a tuner asks for a quantization backend
(utils/quantization_utils.py, resolve_quantization_backend)."""
Plan = Mapping[int | str, Mapping[str, S]]
"""For each layer index, and each region outside the layers by name: what each adapted module (by path) is given."""


def plan(graph: Graph, choice: Targets, setting: Callable[[str], S], *, by_layer: bool = True) -> Plan[S]:
    """`setting(full module name)` of every module that `choice` picks, the same in all layers unless `by_layer`.

    Raises RequestError where it picks none.
    """
    layer = next(r for r in graph.regions if r.first_index is not None)
    by_name = {r.name: r for r in graph.regions}
    result: dict[int | str, dict[str, S]] = {}
    seen: dict[frozenset[str], dict[str, S]] = {}
    for key, paths in chosen_paths(graph, choice).items():
        if paths in seen and not by_layer and isinstance(key, int):
            result[key] = seen[paths]
            continue
        region, index = (layer, key) if isinstance(key, int) else (by_name[key], 0)
        seen[paths] = result[key] = {p: setting(full_path(region, p, index)) for p in sorted(paths)}
    return result


def adapt(
    graph: Graph,
    planned: Plan[S],
    branch: Callable[[Module, S], tuple[Op, ...]],
    *,
    name: str,
    embeds: bool = False,
    layers: frozenset[str] = frozenset(),
) -> Graph:
    """The graph with `branch(module, setting)` in place of each planned module's ops.

    Raises Unsupported where a planned module is the embedding and the branch of method `name` is not modelled there
    (`embeds`), RequestError where it is packed by a library whose layers PEFT has no such branch for (`layers`).
    """

    def rewritten(region: Region) -> Region:
        wanted = planned[region.name if region.first_index is None else region.first_index]

        def choose(module: Module) -> Rewriter | None:
            if module.path not in wanted:
                return None
            if module.site == "embed" and not embeds:
                raise Unsupported(f"{name} on embeddings is not modelled; leave embed_tokens out of --target-modules")
            _check_layer(module, name, layers)
            return lambda m: _only_unpacked(branch(m, wanted[m.path]), m, name)

        return rewrite(region, choose)

    split = split_runs(graph, lambda index: planned[index])
    return replace(split, regions=tuple(map(rewritten, split.regions)))


def check_all_linear(graph: Graph, wanted: object) -> None:
    """Raises RequestError for "all-linear" on a base whose packed layers are no torch.nn.Linear: PEFT looks for those
    (tuners_utils.py, _maybe_include_all_linear_layers)."""
    if wanted != "all-linear":
        return
    kernels = (op.layer for region in graph.regions for op in region.ops if isinstance(op, (PackedLinear, Unpack)))
    other = next((layer for layer in kernels if layer not in (BITSANDBYTES, PLAIN)), None)
    if other is not None:
        raise RequestError(
            f"--target-modules all-linear: PEFT finds no linear layers, as those of {other} are no torch.nn.Linear; "
            "name them"
        )


def _check_layer(module: Module, name: str, layers: frozenset[str]) -> None:
    layer = layer_of(module)
    if layer not in ("", BITSANDBYTES, *layers):
        known = ", ".join((BITSANDBYTES, *sorted(layers)))
        raise RequestError(
            f"PEFT has no {name} for the layers of {layer} ({module.path}), only for torch.nn.Linear and those "
            f"of {known}; use lora, or an unquantized --format"
        )


def _only_unpacked(ops: tuple[Op, ...], module: Module, name: str) -> tuple[Op, ...]:
    """The ops themselves. Raises Unsupported where one reads the packed weight of a torch.nn.Linear as if it was none:
    what a library's tensor class makes of that is its own."""
    if module.weight.stored_bytes is None or layer_of(module):
        return ops
    own = {op.name for op in module.ops}
    for op in ops:
        if op.name not in own and not isinstance(op, Make) and any(t.name == module.weight.name for t in op.ins):
            check_plain(module, name)
    return ops


def layer_of(module: Module) -> str:
    """Whose packed layer stands in for the linear one, "" if none does (`PackedLinear.layer`)."""
    found = (op.layer for op in module.ops if isinstance(op, (PackedLinear, Unpack)) and op.layer != PLAIN)
    return next(found, "")


def lacks_bias(module: Module) -> bool:
    """Whether the weight is of one of torchao's own classes, which lora/torchao.py has a layer for: those are computed
    with by the operators that they are written in, so there is no kernel."""
    return module.weight.stored_bytes is not None and not any(isinstance(op, PackedLinear) for op in module.ops)


def check_plain(module: Module, name: str) -> None:
    """Raises Unsupported where the weight is of a library's tensor class: most operators refuse those."""
    if module.weight.stored_bytes is not None:
        raise Unsupported(
            f"{name} computes with the weight of {module.path} itself, which is not modelled for this --format; use "
            "lora, or an unquantized --format"
        )


def packed(module: Module) -> PackedLinear | None:
    """The kernel on packed weights that stands in for the linear layer, if one does: none where PEFT sees a
    torch.nn.Linear whose weight is of a library's tensor class."""
    return next((op for op in module.ops if isinstance(op, PackedLinear) and op.layer != PLAIN), None)


def narrowed(module: Module) -> Module:
    """The module without the cast that stands for its adapter's (`WeightTypes.widened`)."""
    last = next(i for i in reversed(range(len(module.ops))) if not isinstance(module.ops[i], Hold))
    op = module.ops[last]
    if not op.name.endswith("_widened"):
        return module
    return replace(module, ops=(*module.ops[:last], *module.ops[last + 1 :]), widened=op.out)


def fed(module: Module, given: Tensor) -> tuple[tuple[Op, ...], Tensor]:
    """The module's own ops on `given` in place of its input, and what they make: a packed layer hands on the dtype
    that it is given (bitsandbytes nn/modules.py, Linear4bit.forward; autograd/_functions.py, MatMul8bitLt)."""
    x, values, ops = module.x, {module.x.name: given}, []
    for op in module.ops:
        ins = tuple(values.get(t.name, t) for t in op.ins)
        dtype = op.out.dtype
        leaves = op.out.name == module.out.name
        if (leaves or isinstance(op, PackedLinear)) and dtype is x.dtype and packed(module) is not None:
            dtype = given.dtype
        if isinstance(op, Cast) and ins[0].dtype is dtype:
            values[op.out.name] = ins[0]
            continue
        out = values[op.out.name] = op.out._replace(dtype=dtype)
        ops.append(op.over(ins, out))
    return tuple(ops), values[module.out.name]


def unpacked(b: Builder, module: Module) -> Tensor:
    """dequantize_module_weight: the weight itself, or a whole copy of a packed one (of int8, always in fp32)."""
    weight, kernel = module.weight, packed(module)
    if kernel is None:
        if weight.stored_bytes is not None:
            return b.plain("dequantized", *weight.shape, dtype=weight.dtype, ins=(weight,))
        return weight._replace(trainable=False)
    given = kernel.ins[1]
    if kernel.adapters_clone or kernel.layer != BITSANDBYTES:
        return b.plain("dequantized", *weight.shape, dtype=weight.dtype, ins=(given,))
    half = b.plain("dequantizing", *weight.shape, dtype=DType.float32, ins=(given,))
    return b.plain("dequantized", *weight.shape, dtype=DType.float32, ins=(half,))


def ended(b: Builder, out: Tensor, module: Module, *, name: str) -> tuple[Op, ...]:
    """The ops of `b` with `out` as the module's own output. Raises Unsupported where its dtype would be another."""
    if out.dtype is not module.handed.dtype:
        dtypes = f"{out.dtype.label} in place of {module.handed.dtype.label}"
        found = f"PEFT's {name} makes the output of {module.path} {dtypes}"
        if packed(module) is not None and module.x.dtype.is_half and b.numerics.autocast is None:
            raise RequestError(f"{found} here, and the rest of the model refuses that; set format.prepare=true")
        raise Unsupported(f"{found} here, which is not modelled; leave autocast out, or use a half-precision base")
    return writing(b.ops, out, module.handed)


def train_biases(graph: Graph, planned: Plan[S], which: str) -> Graph:
    """PEFT's `bias`: none, all, or those of the adapted layers (`..._only`)."""
    if which == "none":
        return graph

    def wanted(region: Region, t: Tensor) -> bool:
        if t.trainable or t.kind == ADAPTER or not t.name.endswith(".bias"):
            return t.trainable
        here = planned[region.name if region.first_index is None else region.first_index]
        return which == "all" or t.name.removeprefix("@").removesuffix(".bias") in here

    return train(graph, wanted)


def sees_autocast(host: Host) -> bool:
    """What torch.is_autocast_enabled() answers in PEFT's code: it knows CUDA's autocast only."""
    return host.numerics.autocast is not None and host.numerics.backend == "cuda"
