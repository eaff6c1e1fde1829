"""One steady training step under watch, and the Trace it gives."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from peftplan.instruments import host, placing, prequantized, quantize, recompute, spread
from peftplan.instruments.answer import Trace, alive_at_peak, by_kind, ordered, phase_peaks
from peftplan.instruments.build import Choices, Mode
from peftplan.instruments.hooks import as_if_real, checkpoint_hooks, module_hooks, node_names
from peftplan.instruments.loop import Loop
from peftplan.instruments.recorder import Recorder, Saved

SETTLED = ("transformers/masking_utils.py", "peft/tuners/waveft/layer.py", "elsewhere")
"""Where True or 0.5 is the right answer for a value that is read: no packed sequences; places that are all inside a
padded matrix; any step of Adam's."""
VERSIONED = ("torch", "transformers", "peft", "adapters", "bitsandbytes", "torchao", "hqq", "optimum-quanto")


class Step(Loop):
    """One trace under way."""

    def __init__(self, choices: Choices, model: torch.nn.Module, mode: Mode) -> None:
        super().__init__(choices, model, torch.device("cpu"))
        self.mode = mode
        self.recorder = Recorder()
        self.saved: list[Saved] = []

    def phase(self, name: str) -> None:
        self.recorder.phase = name

    def label(self, tensor: torch.Tensor, kind: str, name: str) -> None:
        self.recorder.relabel(tensor, kind, name)

    def run(self, counts: dict[str, int]) -> Trace:
        """Run two steps and record the second, which finds optimizer state and lazy casts already there."""
        self._watched(self._step)
        if self.job.grad_accum > 1:
            with spread.unsynchronised(self.model, self.job):
                self._watched(self._micro_step)
        self.recorder = Recorder(opened=quantize.opened())
        self._register()
        static = len(self.recorder.events)
        self._watched(self._step)
        return self._answer(static, counts)

    def _watched(self, work: Callable[[], Any]) -> None:
        watched = (module_hooks(self.recorder, self.model), checkpoint_hooks(self.recorder, self.model))
        gathers = spread.resized(self.recorder)
        with self._losses(), watched[0], watched[1], self._kernels(), self._masks(), gathers, self.recorder:
            work()

    def _masks(self) -> AbstractContextManager[None]:
        real = self.mode == "real"
        return nullcontext() if real else as_if_real(self.recorder, padded=self.choices.padded)

    def _register(self) -> None:
        """Tell the recorder what lives between steps."""
        add = self.recorder.add
        for name, param in self.model.named_parameters():
            add(param, "parameter", name)
        for name, param in self.model.named_parameters():
            if param.grad is not None:
                add(param.grad, "gradient", name)
        for name, gradient in spread.whole_gradients(self.model):
            add(gradient, "gradient", name)
        for name, constant in (*quantize.state_tensors(self.model), *prequantized.state_tensors(self.model)):
            add(constant, "quantization", name)
        self._register_buffers()
        self._register_optimizer()
        for tensor in _tensors(self.held):
            add(tensor, "outputs", "")

    def _register_buffers(self) -> None:
        for path, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                lasting = name not in module._non_persistent_buffers_set
                if buffer is not None:
                    self.recorder.add(buffer, "buffer" if lasting else "buffer_non_persistent", f"{path}.{name}")
        for name, _, _, tensor in placing.loose_tensors(self.model):
            self.recorder.add(tensor, "buffer_non_persistent", name)
        if self._allocates:
            allocator = self.model.base_model.rankallocator
            for scores in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
                for name, tensor in scores.items():
                    self.recorder.add(tensor, "buffer_non_persistent", name)

    def _register_optimizer(self) -> None:
        names = {id(param): name for name, param in self.model.named_parameters()}
        for param, key, value in self.optimizer.states():
            kind = "optimizer_step" if key == "step" else "optimizer"
            if isinstance(value, torch.Tensor):
                self.recorder.add(value, kind, f"{names[id(param)]}.{key}" if param is not None else key)

    def _forward(self, batch: dict[str, torch.Tensor]) -> Any:
        keeps = torch.autograd.graph.saved_tensors_hooks(self.recorder.pack, self.recorder.unpack)
        least = recompute.of(self.job).least_sent_bytes
        sends = nullcontext() if least is None else host.activations(self.model, self.recorder.pack, least_bytes=least)
        with keeps, sends:
            outputs = super()._forward(batch)
        for name, param in self.model.named_parameters() if self.choices.method == "cpt" else ():
            self.label(param, "parameter", name)  # CPT gives its parameter new data in every forward
        self.saved = self.recorder.saved(node_names(outputs.loss), list(_tensors(outputs)))
        return outputs

    def _answer(self, static: int, counts: dict[str, int]) -> Trace:
        events = ordered(self.recorder.events)
        phases = phase_peaks(events)
        flops = self.recorder.flops
        backward = {name: flops[name] for name in ("backward", "recompute", "optimizer")}
        counted = {"forward": flops["forward"] + flops["loss"], **backward}
        kinds = by_kind(self.recorder.born[event.id] for event in events[:static])
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
            at_peak=tuple(self.recorder.born[number] for number in alive_at_peak(events)),
            events=tuple(events),
            versions={**versions(), "python": platform.python_version()},
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        guesses = self.recorder.guesses.items()
        guessed = (f"{at}: read a value, took {value}" for at, value in guesses if not at.startswith(SETTLED))
        uncounted = (f"no FLOP formula for {op}: counted 0" for op in sorted(self.recorder.uncounted))
        return (*guessed, *uncounted)


def versions() -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in VERSIONED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


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
