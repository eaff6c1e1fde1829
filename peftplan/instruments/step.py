"""One steady training step under watch, and the Trace it gives."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftplan.errors import RequestError, Unsupported
from peftplan.instruments import fakes, quantize
from peftplan.instruments.answer import Trace, alive_at_peak, by_kind, ordered, phase_peaks
from peftplan.instruments.build import UNWRAPPED, Choices, Mode
from peftplan.instruments.hooks import as_if_real, checkpoint_hooks, module_hooks, node_names
from peftplan.instruments.recorder import Recorder, Saved
from peftplan.job import Job

SETTLED = ("transformers/masking_utils.py", "elsewhere")
"""Where True or 0.5 is the right answer for a value that is read: no packed sequences; any step of Adam's."""
VERSIONED = ("torch", "transformers", "peft", "bitsandbytes")
OPTIMIZERS = {
    "adamw": "auto",
    "adamw_torch": "auto",
    "adamw_for_loop": "for-loop",
    "adamw_foreach": "foreach",
    "adamw_torch_foreach": "foreach",
    "adamw_fused": "fused",
    "adamw_torch_fused": "fused",
}
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "auto": {},
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
"""`auto` is torch's own choice, on the CPU the for-loop."""


class Step:
    """One trace under way."""

    def __init__(self, choices: Choices, model: torch.nn.Module, mode: Mode) -> None:
        self.choices = choices
        self.job = choices.job
        self.model = model
        self.mode = mode
        self.recorder = Recorder()
        self.optimizer = self._optimizer()
        self.saved: list[Saved] = []
        self.held: Any = None

    def run(self, counts: dict[str, int]) -> Trace:
        """Run two steps and record the second, which finds optimizer state and lazy casts already there."""
        self._watched(self._step)
        if self.job.grad_accum > 1:
            self._watched(self._micro_step)
        self.recorder = Recorder(opened=quantize.opened())
        self._register()
        static = len(self.recorder.events)
        self._watched(self._step)
        return self._answer(static, counts)

    def _watched(self, work: Callable[[], Any]) -> None:
        watched = (module_hooks(self.recorder, self.model), checkpoint_hooks(self.recorder, self.model))
        math = sdpa_kernel(SDPBackend.MATH) if self.choices.attention == "sdpa_math" else nullcontext()
        with self._phases(), watched[0], watched[1], math, self._masks(), self.recorder:
            work()

    def _masks(self) -> AbstractContextManager[None]:
        real = self.mode == "real"
        return nullcontext() if real else as_if_real(self.recorder, padded=self.choices.padded)

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [param for param in self.model.parameters() if param.requires_grad]
        if not trained:
            raise RequestError(f"method {self.choices.method!r} trains nothing on this model")
        return torch.optim.AdamW(trained, lr=1e-4, **adamw_switches(self.job))

    def _register(self) -> None:
        """Tell the recorder what lives between steps."""
        add = self.recorder.add
        for name, param in self.model.named_parameters():
            add(param, "parameter", name)
        for name, param in self.model.named_parameters():
            if param.grad is not None:
                add(param.grad, "gradient", name)
        self._register_buffers()
        for name, constant in quantize.state_tensors(self.model):
            add(constant, "quantization", name)
        self._register_optimizer()
        for tensor in _tensors(self.held):
            add(tensor, "outputs", "")

    def _register_buffers(self) -> None:
        for path, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                lasting = name not in module._non_persistent_buffers_set
                if buffer is not None:
                    self.recorder.add(buffer, "buffer" if lasting else "buffer_non_persistent", f"{path}.{name}")
        for name, _, _, tensor in fakes.loose_tensors(self.model):
            self.recorder.add(tensor, "buffer_non_persistent", name)

    def _register_optimizer(self) -> None:
        names = {id(param): name for name, param in self.model.named_parameters()}
        for param, state in self.optimizer.state.items():
            for key, value in state.items():
                kind = "optimizer_step" if key == "step" else "optimizer"
                if isinstance(value, torch.Tensor):
                    self.recorder.add(value, kind, f"{names[id(param)]}.{key}")

    @contextmanager
    def _phases(self) -> Iterator[None]:
        base = self.model.get_base_model() if self.choices.method not in UNWRAPPED else self.model
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
        if self.choices.method == "multitask_prompt_tuning":
            batch["task_ids"] = torch.zeros(self.job.micro_batch, dtype=torch.int64)
        for name, tensor in batch.items():
            self.recorder.relabel(tensor, "batch", name)
        return batch

    def _micro_step(self) -> tuple[Any, ...]:
        """Forward and backward; returns what a loop's variables keep alive: batch, loss, outputs."""
        recorder = self.recorder
        recorder.phase = "forward"
        batch = self._batch()
        outputs = self._forward(batch)
        loss = outputs.loss
        if self.choices.outputs_until != "step":
            outputs = None
        recorder.phase = "backward"
        loss.backward()
        for name, param in self.model.named_parameters():
            if param.grad is not None:
                recorder.relabel(param.grad, "gradient", name)
        return batch, loss, outputs

    def _step(self) -> None:
        kept = self._micro_step()
        self.recorder.phase = "optimizer"
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        del kept

    def _forward(self, batch: dict[str, torch.Tensor]) -> Any:
        dtype = self.choices.autocast
        keeps = torch.autograd.graph.saved_tensors_hooks(self.recorder.pack, self.recorder.unpack)
        with keeps, nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            outputs = self.model(**batch)
        for name, param in self.model.named_parameters():
            self.recorder.relabel(param, "parameter", name)  # CPT gives its parameter new data in every forward
        self.saved = self.recorder.saved(node_names(outputs.loss), list(_tensors(outputs)))
        self.held = outputs if self.choices.outputs_until == "next" else None
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
            versions={**{name: version(name) for name in VERSIONED}, "python": platform.python_version()},
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        guesses = self.recorder.guesses.items()
        guessed = (f"{at}: read a value, took {value}" for at, value in guesses if not at.startswith(SETTLED))
        uncounted = (f"no FLOP formula for {op}: counted 0" for op in sorted(self.recorder.uncounted))
        return (*guessed, *uncounted)


def adamw_switches(job: Job) -> dict[str, bool]:
    """The arguments of torch.optim.AdamW that choose its implementation. Raises Unsupported for others."""
    name = (job.optimizer or "adamw").replace("-", "_").lower()
    if name not in OPTIMIZERS:
        raise Unsupported(f"--optimizer: the trace cannot run {job.optimizer!r}; it can: {', '.join(OPTIMIZERS)}")
    impl = str(job.knobs("optimizer").get("impl", OPTIMIZERS[name]))
    if impl not in IMPLEMENTATIONS:
        raise RequestError(f"optimizer.impl={impl!r}: use one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[impl]


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
