"""The trace instrument: what the real transformers + PEFT model does in one training step, without weights or a GPU.

The step is `loss = model(**batch).loss; loss.backward(); optimizer.step(); optimizer.zero_grad()` in training mode,
watched by `recorder.Recorder`. The backend is torch's **CPU**: operators, their saved tensors and autocast's lists are
the CPU's. `mode="real"` runs the same step on real tensors and must give the same answer (tests hold it to that).
"""

from __future__ import annotations

import gc
import json
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import torch

from peftplan.arch.core import Arch
from peftplan.errors import BadFile, OutsideError, PeftplanError, RequestError
from peftplan.instruments import build, quantize
from peftplan.instruments.answer import Trace, alive_at_peak, by_kind, ordered, phase_peaks
from peftplan.instruments.build import Choices, Mode
from peftplan.instruments.recorder import Recorder, Saved, checkpoint_hooks, module_hooks, node_names
from peftplan.job import Job, make_job

VERSIONED = ("torch", "transformers", "peft", "bitsandbytes")
NOISY = ("bitsandbytes", "transformers", "peft", "torch._subclasses.fake_tensor")


def trace(job: Job, arch: Arch | None = None, *, mode: Mode = "fake") -> Trace:
    """Trace one steady training step of `job`, whose config is `job.config`, or else `arch`'s.

    Raises RequestError for a job that cannot be built, OutsideError for a step that the libraries cannot run.
    """
    if job.config is None and arch is not None:
        job = job.model_copy(update={"config": arch.model_dump()})
    choices = build.decide(job)
    with quiet():
        model = _assembled(choices, mode)
        counts = _count(model)
        with build.fake_tensors() if mode == "fake" else nullcontext():
            return _run(choices, model, mode, counts)


def _assembled(choices: Choices, mode: Mode) -> torch.nn.Module:
    torch.manual_seed(0)
    try:
        model = build.apply_method(build.base_model(choices, mode), choices)
        if choices.recompute:
            build.checkpoint_layers(model, choices.job)
    except PeftplanError:
        raise
    except ImportError as error:
        raise OutsideError(f"method {choices.method!r} needs a package: {_line(error)}") from error
    except Exception as error:  # transformers and PEFT report bad requests with whatever class is at hand
        raise RequestError(f"{choices.method!r} on {choices.job.model!r}: {_line(error)}") from error
    return model.train()


def _run(choices: Choices, model: torch.nn.Module, mode: Mode, counts: dict[str, int]) -> Trace:
    if mode == "fake":
        build.to_fake(model)
    try:
        with patched(choices.padded), quantize.recognised():
            return _Step(choices, model, mode).run(counts)
    except PeftplanError:
        raise
    except Exception as error:  # any library below may fail in any way
        raise OutsideError(
            f"the real model fails in this step: {type(error).__name__}: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings and log lines off stderr."""
    loggers = [logging.getLogger(name) for name in NOISY]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


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
        self.held: list[torch.Tensor] = []

    def run(self, counts: dict[str, int]) -> Trace:
        """Run two steps and record the second, which finds optimizer state and lazy casts already there."""
        self._watched(self._step)
        if self.job.grad_accum > 1:
            self._watched(self._micro_step)
        gc.collect()
        self.recorder = Recorder(opened=quantize.opened())
        self._register()
        static = len(self.recorder.events)
        self._watched(self._step)
        return self._answer(static, counts)

    def _watched(self, work: Callable[[], Any]) -> None:
        watched = (module_hooks(self.recorder, self.model), checkpoint_hooks(self.recorder, self.model))
        with self._phases(), watched[0], watched[1], self.recorder:
            work()

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
            if param.grad is not None:
                add(param.grad, "gradient", name)
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
                    add(
                        value, "optimizer_step" if key == "step" else "optimizer", f"{names[id(param)]}.{key}"
                    )

        for tensor in self.held:
            add(tensor, "outputs", "")

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

    def _micro_step(self) -> tuple[Any, Any]:
        """Forward and backward; returns what a training loop's variables keep alive: the batch and the loss."""
        recorder = self.recorder
        recorder.phase = "forward"
        batch = self._batch()
        loss = self._forward(batch)
        recorder.phase = "backward"
        loss.backward()
        for name, param in self.model.named_parameters():
            if param.grad is not None:
                recorder.relabel(param.grad, "gradient", name)
        return batch, loss

    def _step(self) -> None:
        kept = self._micro_step()
        self.recorder.phase = "optimizer"
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.choices.outputs_until == "step":
            self.held = []
        del kept

    def _forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        dtype = self.choices.autocast
        keeps = torch.autograd.graph.saved_tensors_hooks(self.recorder.pack, self.recorder.unpack)
        with keeps, nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            outputs = self.model(**batch)
        self.saved = self.recorder.saved(node_names(outputs.loss), list(_tensors(outputs)))
        self.held = list(_tensors(outputs)) if self.choices.outputs_until != "loss" else []
        loss: torch.Tensor = outputs.loss
        return loss

    # -- after ------------------------------------------------------------------------------------------------
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
        guessed = (f"{where}: read a value, took {value}" for where, value in self.recorder.guesses.items())
        uncounted = (f"no FLOP formula for {op}: counted 0" for op in sorted(self.recorder.uncounted))
        return (*guessed, *uncounted)


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


def main(argv: list[str]) -> int:
    """`python -m peftplan.instruments.trace JOB.json`: print the Trace as JSON. Returns the exit code."""
    try:
        print(trace(_read_job(argv)).to_json(indent=1))
    except PeftplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _read_job(argv: list[str]) -> Job:
    if len(argv) != 1:
        raise RequestError("usage: python -m peftplan.instruments.trace JOB.json")
    try:
        with open(argv[0], encoding="utf-8") as file:
            fields = json.load(file)
    except (OSError, ValueError) as error:
        raise BadFile(f"cannot read {argv[0]} as a job: {error}") from None
    if not isinstance(fields, dict):
        raise BadFile(f"{argv[0]} holds no JSON object, so no job")
    return make_job(**fields)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
