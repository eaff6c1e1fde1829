"""The trace instrument: what the real transformers + PEFT model does in one training step, without weights or a GPU.

The step is `loss = model(**batch).loss; loss.backward(); optimizer.step(); optimizer.zero_grad()` in training mode,
watched by `recorder.Recorder`. The backend is torch's **CPU**: operators, their saved tensors and autocast's lists are
the CPU's. `mode="real"` runs the same step on real tensors and must give the same answer (tests hold it to that).
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import torch

from peftplan.arch.core import Arch
from peftplan.errors import RequestError
from peftplan.instruments import build, quantize
from peftplan.instruments.build import Choices, Mode
from peftplan.instruments.recorder import (
    STATIC_KINDS,
    Event,
    Recorder,
    Saved,
    Storage,
    checkpoint_hooks,
    module_hooks,
    node_names,
)
from peftplan.job import Job, make_job

PHASES = ("forward", "loss", "backward", "optimizer")
VERSIONED = ("torch", "transformers", "peft", "bitsandbytes")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One steady training step of the real model. All sizes in bytes, unrounded; all FLOPs with 1 MAC = 2."""

    job: dict[str, Any]
    mode: str
    """`fake` (no data) or `real` (random weights)."""
    backend: str
    parameters: dict[str, int]
    """`total`, `trainable` as PEFT counts them; `stored_bytes`: unique storages, quantization constants included."""
    static: dict[str, int]
    """Bytes by kind of what lives between steps (kinds: recorder.STATIC_KINDS)."""
    static_bytes: int
    saved_for_backward_bytes: int
    """Storages alive at the end of forward only because backward needs them: no parameters, no buffers."""
    peak_bytes: int
    peak_phase: str
    phases: dict[str, int]
    """Peak bytes while in each phase."""
    flops: dict[str, int]
    """`forward` (with the loss), `backward` (without recomputation), `recompute`, `optimizer`, `total`."""
    saved: tuple[Saved, ...]
    at_peak: tuple[Storage, ...]
    events: tuple[Event, ...]
    versions: dict[str, str]
    notes: tuple[str, ...]

    def model_dump(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("saved", "at_peak", "events"):
            fields[name] = [row._asdict() for row in fields[name]]
        return fields

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.model_dump(), indent=indent)


def trace(job: Job, arch: Arch | None = None, *, mode: Mode = "fake") -> Trace:
    """Trace one steady training step of `job`.

    The config is `job.config`, or `arch`'s. Raises RequestError for what is not traceable.
    """
    if job.config is None and arch is not None:
        job = job.model_copy(update={"config": arch.model_dump()})
    choices = build.decide(job)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        model = _assemble(choices, mode)
        counts = _count(model)
        if mode == "fake":
            stack.enter_context(build.fake_tensors())
            build.to_fake(model)
        stack.enter_context(patched(choices.padded))
        stack.enter_context(quantize.recognised())
        return _Step(choices, model, mode).run(counts)


def _assemble(choices: Choices, mode: Mode) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build.apply_method(build.base_model(choices, mode), choices)
    if choices.recompute:
        build.checkpoint_layers(model, choices.job)
    return model.train()


def _count(model: torch.nn.Module) -> dict[str, int]:
    from peft import PeftModel

    trainable, total = PeftModel.get_nb_trainable_parameters(model)
    return {"total": total, "trainable": trainable}


@contextmanager
def patched(padded: bool) -> Iterator[None]:
    """Answer the questions that fake tensors cannot: is this tracing (no), is there padding, which step is it."""
    import transformers.masking_utils as masks

    adam = sys.modules["torch.optim.adam"]
    saved = (masks.is_tracing, masks.fast_all, masks.find_packed_sequence_indices, adam._get_value)

    def all_true(tensor: torch.Tensor) -> bool:
        del_me = tensor.sum() == tensor.numel()
        del del_me
        return not padded

    def one_sequence(position_ids: torch.Tensor) -> None:
        first = position_ids[:, :1] - 1
        steps = (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)
        (steps[:, -1] == 0).all()

    def step_value(tensor: Any) -> float:
        return 2.0 if isinstance(tensor, torch.Tensor) else float(tensor)

    masks.is_tracing = lambda tensor=None: False
    masks.fast_all = all_true
    masks.find_packed_sequence_indices = one_sequence
    adam._get_value = step_value
    try:
        yield
    finally:
        masks.is_tracing, masks.fast_all, masks.find_packed_sequence_indices, adam._get_value = saved


class _Step:
    """One trace under way."""

    def __init__(self, choices: Choices, model: torch.nn.Module, mode: Mode) -> None:
        self.choices = choices
        self.job = choices.job
        self.model = model
        self.mode = mode
        self.recorder = Recorder()
        self.optimizer = self._optimizer()
        self.saved: list[Saved] = []

    def run(self, counts: dict[str, int]) -> Trace:
        """Run two steps and record the second, which finds optimizer state and lazy casts already there."""
        self._watched_step()
        gc.collect()
        self.recorder = Recorder(opened=quantize.opened())
        self._register()
        static = len(self.recorder.events)
        self._watched_step()
        return self._answer(static, counts)

    def _watched_step(self) -> None:
        watched = (module_hooks(self.recorder, self.model), checkpoint_hooks(self.recorder, self.model))
        with self._phases(), watched[0], watched[1], self.recorder:
            self._step()

    # -- before -----------------------------------------------------------------------------------------------
    def _optimizer(self) -> torch.optim.Optimizer:
        if (self.job.optimizer or "adamw") != "adamw":
            raise RequestError(f"--optimizer: the trace cannot run {self.job.optimizer!r}; it can: adamw")
        knobs = {
            "auto": {},
            "for-loop": {"foreach": False, "fused": False},
            "foreach": {"foreach": True},
            "fused": {"fused": True},
        }
        impl = str(self.job.knobs("optimizer").get("impl", "auto"))
        if impl not in knobs:
            raise RequestError(f"optimizer.impl={impl!r}: use one of {', '.join(knobs)}")
        trained = [param for param in self.model.parameters() if param.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-4, **knobs[impl])

    def _register(self) -> None:
        add = self.recorder.add
        for name, param in self.model.named_parameters():
            add(param, "parameter", name)
        for path, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                lasting = name not in module._non_persistent_buffers_set
                if buffer is not None:
                    add(buffer, "buffer" if lasting else "buffer_non_persistent", f"{path}.{name}")
        for name, _, _, tensor in build.loose_tensors(self.model):
            add(tensor, "buffer_non_persistent", name)
        for name, constant in quantize.state_tensors(self.model):
            add(constant, "quantization", name)
        names = {id(param): name for name, param in self.model.named_parameters()}
        for param, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    add(value, "optimizer_step" if key == "step" else "optimizer", f"{names[id(param)]}.{key}")

    # -- the step ---------------------------------------------------------------------------------------------
    @contextmanager
    def _phases(self) -> Iterator[None]:
        base = self.model.get_base_model() if self.choices.method not in ("full", "freeze") else self.model
        loss_function = base.loss_function

        def loss(*args: Any, **kwargs: Any) -> Any:
            self.recorder.phase = "loss"
            return loss_function(*args, **kwargs)

        base.loss_function = loss
        try:
            yield
        finally:
            base.loss_function = loss_function

    def _batch(self) -> dict[str, torch.Tensor]:
        shape = (self.job.micro_batch, self.choices.seq_len)
        ids = torch.ones(shape, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.choices.padded:
            batch["attention_mask"] = torch.ones(shape, dtype=torch.int64)
            batch["attention_mask"][-1, -1:] = 0
        for name, tensor in batch.items():
            self.recorder.relabel(tensor, "batch", name)
        return batch

    def _step(self) -> None:
        recorder = self.recorder
        recorder.phase = "forward"
        batch = self._batch()
        loss = self._forward(batch)
        recorder.phase = "backward"
        loss.backward()
        for name, param in self.model.named_parameters():
            if param.grad is not None:
                recorder.relabel(param.grad, "gradient", name)
        recorder.phase = "optimizer"
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        del loss, batch
        recorder.phase = "after"

    def _forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        dtype = self.choices.autocast
        keeps = torch.autograd.graph.saved_tensors_hooks(self.recorder.pack, self.recorder.unpack)
        with keeps, nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            outputs = self.model(**batch)
        self.saved = self.recorder.saved(node_names(outputs.loss), list(_tensors(outputs)))
        loss: torch.Tensor = outputs.loss
        return loss

    # -- after ------------------------------------------------------------------------------------------------
    def _answer(self, static: int, counts: dict[str, int]) -> Trace:
        events = _ordered(event for event in self.recorder.events if event.phase != "after")
        phases, where = _peaks(events)
        flops = self.recorder.flops
        backward = {name: flops[name] for name in ("backward", "recompute", "optimizer")}
        counted = {"forward": flops["forward"] + flops["loss"], **backward}
        kinds = _by_kind(self.recorder.born[event.id] for event in events[:static])
        return Trace(
            job=self.job.model_dump(mode="json", by_alias=True),
            mode=self.mode,
            backend="cpu",
            parameters={**counts, "stored_bytes": kinds["parameter"] + kinds["quantization"]},
            static=kinds,
            static_bytes=sum(kinds.values()),
            saved_for_backward_bytes=sum(entry.bytes for entry in self.saved),
            peak_bytes=max(phases.values()),
            peak_phase=max(phases, key=lambda name: phases[name]),
            phases=phases,
            flops={**counted, "total": sum(counted.values())},
            saved=tuple(self.saved),
            at_peak=tuple(self.recorder.born[number] for number in _alive_at(events, where)),
            events=tuple(events),
            versions={**{name: version(name) for name in VERSIONED}, "python": platform.python_version()},
            notes=tuple(f"{where}: read a value, took {value}" for where, value in self.recorder.guesses.items()),
        )


def _ordered(events: Iterable[Event]) -> list[Event]:
    """The same events with every run of frees in the order of ids: autocast clears its cache in no fixed order."""
    ordered: list[Event] = []
    for action, run in itertools.groupby(events, key=lambda event: event.action):
        ordered.extend(sorted(run, key=lambda event: event.id) if action == "free" else run)
    return ordered


def _by_kind(storages: Iterator[Storage]) -> dict[str, int]:
    kinds = dict.fromkeys(STATIC_KINDS, 0)
    for storage in storages:
        kinds[storage.kind] += storage.bytes
    return kinds


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a model's output: loss, logits, and the keys and values of its cache."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif type(value).__module__.startswith("transformers."):
        yield from _tensors(list(vars(value).values()))


def _peaks(events: list[Event]) -> tuple[dict[str, int], int]:
    """Peak bytes of each phase, and the index of the event after which the most is alive."""
    level, best, where = 0, -1, 0
    peaks = dict.fromkeys(PHASES, 0)
    for index, event in enumerate(events):
        if event.phase in peaks:
            peaks[event.phase] = max(peaks[event.phase], level)
        level += event.bytes if event.action == "alloc" else -event.bytes
        if event.phase in peaks:
            peaks[event.phase] = max(peaks[event.phase], level)
            if level > best:
                best, where = level, index
    return peaks, where


def _alive_at(events: list[Event], where: int) -> list[int]:
    alive: dict[int, None] = {}
    for event in events[: where + 1]:
        if event.action == "alloc":
            alive[event.id] = None
        else:
            alive.pop(event.id, None)
    return list(alive)


def main(argv: list[str] | None = None) -> int:
    """`python -m peftplan.instruments.trace JOB.json`: print the Trace as JSON."""
    path = (sys.argv[1:] if argv is None else argv)[0]
    with open(path, encoding="utf-8") as file:
        job = make_job(**json.load(file))
    print(trace(job).to_json(indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
