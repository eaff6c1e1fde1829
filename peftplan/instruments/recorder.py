"""Records every storage of one training step: when it is allocated, by whom, and when it dies.

A `TorchDispatchMode` sees every operator below autograd, in forward and in backward, so a storage is recorded
the moment an operator returns it and un-recorded by a weak reference's callback when its last owner lets go.
Nothing is rounded. Temporaries inside one kernel are invisible, except in the operators given as `opened`:
custom ones whose kernel is Python, which is run through the recorder.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)

from peftplan.instruments import ranks
from peftplan.instruments.engine import adds_bias, filling_in_place, sums_in_place
from peftplan.instruments.fakes import grouped_product
from peftplan.instruments.flops import flops_of, looks_heavy

STATIC_KINDS = (
    "parameter",
    "quantization",
    "buffer",
    "buffer_non_persistent",
    "optimizer",
    "optimizer_step",
    "gradient",
    "outputs",
)
"""Kinds of storage that live between steps. `optimizer_step` are Adam's step counters, which torch keeps on
the CPU even for parameters on a GPU (unless fused); `gradient` where gradients accumulate; `outputs` where a
loop holds on to the model's outputs.
"""

GATHERED = "gathered"
"""Whole parameters put together from the parts that ranks hold."""

_aten = torch.ops.aten
_ITEM = _aten._local_scalar_dense.default
_INDEX = _aten.index.Tensor
_GROUPED = _aten._grouped_mm.default
_ANSWERS: dict[str, Any] = {"peft/tuners/vblora/layer.py": False, "peft/tuners/poly/router.py": 0}
"""By source file, the right answer to what it reads of a tensor: whether logits are infinite; the largest task."""
_LIBRARIES = ("/transformers/", "/peft/", "/adapters/", "/bitsandbytes/")


class Event(NamedTuple):
    """One storage allocated or freed, in order of occurrence."""

    action: str
    """`alloc` or `free`."""
    id: int
    bytes: int
    phase: str
    """`forward`, `loss`, `backward` or `optimizer`; `static` for what existed before the step."""
    op: str
    """The operator running, or the last one that ran (`aten.mm.default`)."""
    module: str
    """Dotted path of the module whose forward, or whose forward's gradient, was running; `` outside."""


class Storage(NamedTuple):
    """One storage as it was born. Bytes are those of the storage, not of the tensor that views it."""

    id: int
    bytes: int
    kind: str
    shape: tuple[int, ...]
    dtype: str
    phase: str
    op: str
    module: str
    source: str
    """`peft/tuners/lora/layer.py:1102`: the innermost line in transformers, peft or bitsandbytes."""


class Saved(NamedTuple):
    """One storage that the end of forward keeps, and why."""

    id: int
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    """The operator whose backward wants it."""
    module: str
    source: str
    born_op: str
    born_module: str
    via: str
    """`autograd`: autograd packed it; `alive`: something else keeps it (a closure, an attribute of a ctx)."""


class Place(NamedTuple):
    """Where the Python code of the model is."""

    module: str
    source: str


def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors that have a storage: of a sparse one its indices and values, of one of a library's own class those
    it is made of, of one spread over ranks this rank's, else itself."""
    tensor = ranks.local(tensor)
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not is_traceable_wrapper_subclass(tensor):
        return (tensor._indices(), tensor._values()) if tensor.layout is torch.sparse_coo else (tensor,)
    names, _ = tensor.__tensor_flatten__()
    return tuple(part for name in names for part in parts(getattr(tensor, name)))


def _storages(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield from parts(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _storages(item)


def _everything(index: torch.Tensor | None) -> torch.Tensor | None:
    """The places of a mask of one dimension, were it all true."""
    if index is None or index.dtype is not torch.bool:
        return index
    return torch.empty(index.shape[0], dtype=torch.int64, device=index.device)


@functools.cache
def _library_path(filename: str) -> str | None:
    for library in _LIBRARIES:
        if "/site-packages" + library in filename or "/dist-packages" + library in filename:
            return library[1:] + filename.rsplit(library, 1)[1]
    return None


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is only a recipe of others. Autograd expands those; `opened` code shows them."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CPU")


@functools.cache
def _is_wrapper(cls: type) -> bool:
    """Whether tensors of a class are made of others, on which its Python code runs."""
    return "__tensor_flatten__" in dir(cls)


def _source_line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = _library_path(frame.f_code.co_filename)
        if path is not None and not path.endswith(("utils/generic.py", "utils/output_capturing.py")):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Watches one step. `phase` is set by whoever runs it; `enter`/`leave` by module hooks.

    `opened` maps a custom operator's name to its Python kernel. `flops` counts with torch's formulas
    (`torch.utils.flop_counter`), by phase, with `recompute` apart from `backward`.
    """

    def __init__(self, opened: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self._opened = opened or {}
        self.phase = "static"
        self.events: list[Event] = []
        self.born: dict[int, Storage] = {}
        self.alive: dict[int, int] = {}
        self.packed: dict[int, tuple[int, Place, torch.Size]] = {}
        self.flops = dict.fromkeys(("forward", "loss", "backward", "recompute", "optimizer"), 0)
        self.recomputing = 0
        self.guesses: dict[str, Any] = {}
        """Source line -> value taken there, where the model read a tensor's value and there was none."""
        self.answers = dict(_ANSWERS)
        """Source file -> what a truth value that is read there is, where nobody can know; elsewhere True."""
        self.uncounted: set[str] = set()
        """Operators that look like products and have no FLOP formula."""
        self._known: dict[int | None, Any] = {}
        self._ids: dict[int, int] = {}
        self._refs: dict[int, Any] = {}
        self._stack: list[str] = []
        self._op = ""
        self._place_of_node: dict[int, Place] = {}
        self._op_of_node: dict[int, str] = {}

    def add(self, tensor: torch.Tensor, kind: str, name: str) -> int:
        """Record a storage that exists already (or return its id, if it is known)."""
        return [self._see(part, Place(name, ""), kind) for part in parts(tensor)][-1]

    def id_of(self, tensor: torch.Tensor) -> int | None:
        """The id of a living storage, None where the recorder never saw it."""
        return self._ids.get(ranks.local(tensor).untyped_storage()._cdata)

    def relabel(self, tensor: torch.Tensor, kind: str, name: str) -> None:
        """Say what a recorded storage turned out to be (a gradient)."""
        number = self.id_of(tensor)
        if number is not None:
            self.born[number] = self.born[number]._replace(kind=kind, module=name)

    def know(self, tensor: torch.Tensor, value: Any) -> None:
        """Say what `tensor.item()` is, should anyone ask."""
        number = self.id_of(tensor)
        if number is not None:
            self._known[number] = value

    def _see(self, tensor: torch.Tensor, place: Place | None, kind: str) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._ids.get(key)
        if known is not None:
            if storage.nbytes() != self.alive[known]:
                self._resized(known, storage.nbytes())
            return known
        place = place or self._place()
        number = len(self.born)
        size = storage.nbytes()
        self._ids[key] = number
        self._refs[number] = weakref.ref(storage, functools.partial(self._died, key, number))
        self.alive[number] = size
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        self.born[number] = Storage(number, size, kind, shape, dtype, self.phase, self._op, place.module, place.source)
        self.events.append(Event("alloc", number, size, self.phase, self._op, place.module))
        return number

    def _resized(self, number: int, size: int) -> None:
        born = self.born[number]
        self.events.append(Event("free", number, self.alive[number], self.phase, self._op, born.module))
        self.events.append(Event("alloc", number, size, self.phase, self._op, born.module))
        self.alive[number] = size
        self.born[number] = born._replace(bytes=size)

    def _died(self, key: int, number: int, _ref: Any) -> None:
        self._ids.pop(key, None)
        self._refs.pop(number, None)
        size = self.alive.pop(number)
        module = self._stack[-1] if self._stack else ""
        self.events.append(Event("free", number, size, self.phase, self._op, module))

    def enter(self, name: str) -> None:
        self._stack.append(name)

    def leave(self) -> None:
        if self._stack:
            self._stack.pop()

    @contextmanager
    def layer(self, name: str) -> Iterator[None]:
        """A checkpointed layer runs: the first time, or again in backward. May be left by an exception."""
        depth, again = len(self._stack), self.phase == "backward"
        self._stack.append(name)
        self.recomputing += again
        try:
            yield
        finally:
            self.recomputing -= again
            del self._stack[depth:]

    def _place(self) -> Place:
        if self._stack:
            return Place(self._stack[-1], _source_line())
        node = torch._C._current_autograd_node()
        if node is None:
            return Place("", _source_line())
        return self._place_of_node.get(node._sequence_nr(), Place("", ""))

    def _note_node(self, op: str) -> None:
        number = torch._C._autograd._get_sequence_nr() - 1
        if number not in self._op_of_node:
            self._op_of_node[number] = op
            self._place_of_node[number] = Place(self._stack[-1] if self._stack else "", _source_line())

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pack hook: remember the storage, keep the tensor as it is; a node's own output without the node, which would
        otherwise keep itself alive where nobody runs it backward."""
        node = torch._C._autograd._get_sequence_nr() - 1
        for part in parts(tensor):
            number = self.id_of(part)
            if number is not None and number not in self.packed:
                place = Place(self._stack[-1] if self._stack else "", _source_line())
                self.packed[number] = (node, place, part.shape)
        if tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() == node:
            with _disable_current_modes():
                return tensor.detach()
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def saved(self, nodes: dict[int, str], outputs: Sequence[torch.Tensor]) -> list[Saved]:
        """What the end of forward keeps: packed by autograd, or alive and not among `outputs`."""
        held = {self.id_of(tensor) for tensor in outputs}
        found = []
        for number in self.alive:
            born = self.born[number]
            if number in self.packed and born.kind not in (*STATIC_KINDS, GATHERED):
                node, place, shape = self.packed[number]
                op = nodes.get(node) or self._op_of_node.get(node, "")
                found.append(self._saved(born, op, place, "autograd")._replace(shape=tuple(shape)))
            elif born.phase in ("forward", "loss") and born.kind == "activation" and number not in held:
                found.append(self._saved(born, "", Place(born.module, born.source), "alive"))
        return found

    def _saved(self, born: Storage, op: str, place: Place, via: str) -> Saved:
        return Saved(
            id=born.id,
            bytes=born.bytes,
            shape=born.shape,
            dtype=born.dtype,
            op=op,
            module=place.module,
            source=place.source,
            born_op=born.op,
            born_module=born.module,
            via=via,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if ranks.unwraps(types):
            return NotImplemented  # it comes back with a rank's own tensors
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        opened = self._opened.get(str(func))
        if opened is not None:
            with self:
                return opened(*args, **kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        own = next((cls for cls in types if issubclass(cls, torch.Tensor) and _is_wrapper(cls)), None)
        if own is not None:
            with self:
                return own.__torch_dispatch__(func, types, args, kwargs)
        self._op = str(func)
        if self.phase == "backward" and sums_in_place(func, args):
            return args[0].add_(args[1])
        in_place = filling_in_place(func) if self.phase == "backward" else None
        if in_place is not None:
            return in_place(*args, **kwargs)
        if adds_bias(func, args):
            return _aten.alias.default(args[0].add_(args[1]))
        if self.phase in ("forward", "loss") or self.recomputing:
            self._note_node(self._op)
        if ranks.waits(func):  # has no result of its own but on fake tensors
            return args[0]
        out = self._run(func, args, kwargs)
        self._count(func, args, kwargs, out)
        for tensor in _storages(out):
            if not tensor.is_meta:
                self._see(tensor, None, "activation")
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's result; where it depends on values and there are none, what is known or guessed."""
        if func is _ITEM:
            return self._read(args[0])
        if func is _GROUPED:
            return grouped_product(*args, **kwargs)
        return self._pick(*args) if func is _INDEX else func(*args, **kwargs)

    def _pick(self, tensor: torch.Tensor, indices: Any) -> Any:
        """`tensor[indices]`. A fake mask is taken to pick everything."""
        try:
            return _INDEX(tensor, indices)
        except DynamicOutputShapeException:
            self.guesses[_source_line() or "elsewhere"] = True
            return _INDEX(tensor, [_everything(index) for index in indices])

    def _read(self, tensor: torch.Tensor) -> Any:
        """`tensor.item()`. A fake tensor has no value: what is known, else True, 1 or 0.5 (see `guesses`)."""
        try:
            return _ITEM(tensor)
        except DataDependentOutputException:
            number = self.id_of(tensor)
            if number in self._known:
                return self._known[number]
            where = _source_line() or "elsewhere"
            unknown = True if tensor.dtype is torch.bool else 0.5 if tensor.is_floating_point() else 1
            value = self.answers.get(where.partition(":")[0], unknown)
            self.guesses[where] = value
            return value

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        flops = flops_of(func, args, kwargs, out)
        if flops is not None:
            self.flops["recompute" if self.recomputing else self.phase] += flops
        elif looks_heavy(str(func)):
            self.uncounted.add(str(func))
