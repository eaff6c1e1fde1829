"""Running a region's nodes backward: which gradients exist when, as torch's autograd engine makes and frees them.

torch/csrc/autograd/engine.cpp and input_buffer.cpp: nodes run in reverse order of creation; a node's gradients are
computed while its incoming gradient and what it saved are alive, then reduced and cast to their inputs' shape and
dtype, then the incoming gradient is freed, then what was saved, then each is handed on or added to what is already
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from peftplan.graph.core import PARAMS, Op, Tensor, is_global
from peftplan.step.walk.account import CARRIED, Account, event_key
from peftplan.step.walk.kept import Kept
from peftplan.step.walk.updates import Updates, Waiting


class Gradient:
    """A gradient's storage; `refs` counts who holds it. The exit's is number 0."""

    __slots__ = ("bytes", "number", "refs", "request_bytes", "viewed")

    def __init__(self, request_bytes: int, size: int, number: int) -> None:
        self.request_bytes = request_bytes
        self.bytes = size
        self.number = number
        self.refs = 1
        self.viewed = False

    @property
    def key(self) -> str:
        return event_key(self.number)


class Gradients:
    """The gradients in flight in one region's backward."""

    __slots__ = (
        "_arrived", "_last", "_made", "_penalised", "_size", "_updates", "_waits", "account", "flowing", "global_grads",
        "grads_exist", "kept", "need", "of_model", "of_params",
    )  # fmt: skip

    def __init__(
        self,
        account: Account,
        kept: Kept,
        need: set[str],
        *,
        global_grads: dict[str, int],
        grads_exist: bool,
        updates: Updates | None = None,
    ) -> None:
        self.account = account
        self.kept = kept
        self.need = need
        self.global_grads = global_grads
        self.grads_exist = grads_exist
        self._waits = kept.plan.region.is_penalty
        self.flowing: dict[str, Gradient] = {}
        """The gradient of each value, as far as it has been summed."""
        self.of_params: list[Gradient] = []
        """Parameter gradients that this region's backward leaves."""
        self.of_model: list[Gradient] = []
        """Those of them whose parameters belong to no region."""
        self._updates = updates
        self._arrived: list[tuple[Tensor, Gradient]] = []
        self._last: Gradient | None = None
        self._made = 0
        self._size: Callable[[int], int] = kept.plan.size
        penalty = kept.plan.region.penalty
        self._penalised = frozenset(t.name for t in penalty.params()) if penalty is not None else frozenset[str]()
        """Parameters that have a part of their gradient already, from the penalty's backward, which is over by now."""

    def enter(self, exit_: Tensor, *, root: bool) -> None:
        """The gradient of the exit, alive already. The engine itself holds the gradient of a `root`."""
        request = exit_.logical_bytes
        gradient = self.flowing[exit_.name] = Gradient(request, self._size(request), 0)
        gradient.refs += root

    def make(self, request_bytes: int, where: str) -> Gradient:
        size = self._size(request_bytes)
        number = self._made = self._made + 1
        self.account.alloc(size, where, number)
        return Gradient(request_bytes, size, number)

    def _compose(self, op: Op, request_bytes: int, scratch_bytes: int) -> Gradient:
        """What the last of a formula's kernels makes, after their temporaries."""
        size = self._size(request_bytes)
        number = self._made = self._made + 1
        self.account.compose(size, op.name, number, scratch=scratch_bytes, pieces=op.pieces)
        return Gradient(request_bytes, size, number)

    def node(self, op: Op, saves: tuple[Tensor, ...], incoming: Gradient, *, recomputed: bool) -> None:
        """One node. What a checkpoint `recomputed` is handed over once, so it dies with the formula that unpacked it
        (torch/utils/checkpoint.py, unpack_hook); what a node itself saved dies after its gradients are settled."""
        where = op.name
        reloaded: dict[str, Gradient] = {}
        if self.kept.sends:
            gone = self.kept.away(op, saves)
            reloaded = {t.name: self.make(t.nbytes, where) for t in reversed(gone)}
            saves = tuple(t for t in saves if t not in gone)
        made: list[tuple[Tensor, Gradient]] = []
        others = self._others(op) if op.also else {}
        for to, raw_bytes, scratch_bytes, over in op.backward(self.need):
            if over is None:
                pass
            elif over.name in others:
                others[over.name].refs += 1
                made.append((to, others[over.name]))
                continue
            elif over.name in reloaded:
                self._release(reloaded.pop(over.name))
            else:
                self.kept.release((over,))
                saves = tuple(t for t in saves if t is not over)
            if not raw_bytes:
                incoming.refs += 1
                made.append((to, incoming))
            elif scratch_bytes and not op.output_first:
                made.append((to, self._compose(op, raw_bytes, scratch_bytes)))
            else:
                made.append((to, self.make(raw_bytes, where)))
                if scratch_bytes:
                    self.account.touch(scratch_bytes, where)
        if reloaded:
            for copy in reloaded.values():
                self._release(copy)
        if recomputed and saves:
            self.kept.release(saves)
        for j, (to, gradient) in enumerate(made):
            final = to.logical_bytes
            if final == gradient.request_bytes:
                continue
            if op.narrows and to.dtype is op.out.dtype:
                continue
            reduced = to.numel * op.out.dtype.size
            for step in (reduced, final) if final < reduced < gradient.request_bytes else (final,):
                if step != gradient.request_bytes:
                    whole, gradient = gradient, self.make(step, where)
                    self._release(whole)
            made[j] = (to, gradient)
        self._release(incoming)
        if others:
            for other in others.values():
                self._release(other)
        if saves and not recomputed:
            self.kept.release(saves)
        if op.views:
            for to, gradient in made:
                gradient.viewed |= to is op.ins[0]
        for to, gradient in made:
            if to.kind in PARAMS:
                self._accumulate(to, gradient, op)
            else:
                self._hand_on(to, gradient, where)
        if self._arrived:
            self._update(where)

    def _others(self, op: Op) -> dict[str, Gradient]:
        """The gradients of an op's further outputs."""
        return {t.name: self.flowing.pop(t.name) for t in op.also if t.name in self.flowing}

    def _hand_on(self, to: Tensor, gradient: Gradient, where: str) -> None:
        flowing = self.flowing
        old = flowing.get(to.name)
        if to.name not in self.need:
            self._release(gradient)
        elif to.name[0] == "@" and self._is_foreign(to):
            self._meet(to, gradient)
        elif old is None:
            flowing[to.name] = gradient
        elif old.refs == 1 and not old.viewed:  # input_buffer.cpp, accumulate: in place where nobody else holds it
            self._release(gradient)
        else:
            flowing[to.name] = self.make(to.logical_bytes, where)
            self._release(old)
            self._release(gradient)

    def _is_foreign(self, to: Tensor) -> bool:
        """Whether it is a value of the whole model that another region made."""
        return is_global(to.storage) and to.storage not in self.kept.plan.made_globals and to.name == to.storage

    def _meet(self, to: Tensor, gradient: Gradient) -> None:
        """The regions that read a value add their gradients of it into one, which the region that made it is given."""
        if to.name in self.global_grads:
            self._release(gradient)
        self.global_grads.setdefault(to.name, gradient.bytes)

    def take_met(self) -> None:
        """What other regions left for the values that this one made."""
        for name in self.kept.plan.made_globals:
            if name in self.need and name in self.global_grads:
                self._made += 1
                request = self.kept.plan.request_bytes[name]
                self.flowing[name] = Gradient(request, self.global_grads.pop(name), self._made)

    def _accumulate(self, to: Tensor, gradient: Gradient, op: Op) -> None:
        """AccumulateGrad: the gradient is added to what is there, or stays. It runs once, when every part has come: a
        penalty's waits for the layer's even where there is a gradient to add it to."""
        size = self._size(to.logical_bytes)
        if to.name in self._penalised:
            self._release(gradient)
            if self.grads_exist:
                self.account.free(size, f"{to.name} waiting")
                self.account.grad_bytes -= size
            return
        if (self.grads_exist and not self._waits) or to.name in self.global_grads:
            self._release(gradient)
            return
        if gradient.refs > 1 and not op.narrows:  # an incoming gradient itself cannot be stolen: it is cloned
            self._release(gradient)
            gradient = self.make(to.logical_bytes, op.name)
        held = gradient.bytes if gradient.refs == 1 else size  # of several parts each counts for itself
        alone = self._updates is not None and self._updates.alone(to)
        if is_global(to.name) and not alone:
            self.global_grads[to.name] = held
            self.of_model.append(gradient)
        self.of_params.append(gradient)
        self.account.grad_bytes += held
        if alone:
            self._arrived.append((to, gradient))

    def _update(self, where: str) -> None:
        """The weights whose gradients have just arrived, or where that is the policy, those before them."""
        updates = self._updates
        assert updates is not None
        for to, gradient in self._arrived:
            scratch = updates.policy.scratch_bytes(to, self.kept.plan.region)
            if scratch is None:
                continue
            if updates.policy.late:
                self._use_waiting(updates.waiting, where)
                updates.waiting.bytes, updates.waiting.scratch_bytes = gradient.bytes, scratch
                self._last = gradient
            else:
                self.account.touch(scratch, where)
                self._use(gradient)
        self._arrived.clear()

    def last_updates(self, weight: Callable[[str], Tensor]) -> Iterator[tuple[int, int]]:
        """(bytes, temporaries of its update) of each gradient that is left when all regions' backward is done."""
        updates = self._updates
        if updates is None:
            return
        if updates.waiting.bytes:
            yield updates.waiting.bytes, updates.waiting.scratch_bytes
        for name, size in self.global_grads.items():
            scratch = updates.policy.scratch_bytes(weight(name), self.kept.plan.region)
            if scratch is not None:
                yield size, scratch

    def _use_waiting(self, waiting: Waiting, where: str) -> None:
        if not waiting.bytes:
            return
        self.account.touch(waiting.scratch_bytes, where)
        if self._last is not None:
            self._use(self._last)
        else:
            self.account.grad_bytes -= waiting.bytes
            self.account.free(waiting.bytes, CARRIED)

    def _use(self, gradient: Gradient) -> None:
        self.account.grad_bytes -= gradient.bytes
        self._release(gradient)

    def settle(self, leaf: Tensor, gradient: Gradient) -> None:
        """A leaf that is no parameter takes its gradient as it is, but clones a part of a larger one whose rows do not
        follow each other (accumulate_grad.h, obeys_layout_contract)."""
        if gradient.request_bytes != leaf.logical_bytes and leaf.shape[0] > 1:
            self.make(leaf.logical_bytes, leaf.name)
            self._release(gradient)

    def _release(self, gradient: Gradient) -> None:
        gradient.refs -= 1
        if gradient.refs == 0:
            self.account.free(gradient.bytes, gradient.number)
