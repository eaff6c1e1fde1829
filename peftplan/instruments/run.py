"""One run of the real thing: a job's model with random weights trains a few steps on a device, and leaves a Record.

Transformers and PEFT build the model (`build`, as for the trace), the loop is the trace's (`loop`), the allocator
counts (`gauge`). Warm-up steps come first: they make optimizer states and load kernels; the next step is read phase by
phase, those after it are timed with nobody asking anything.
"""

from __future__ import annotations

import gc
import importlib
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch

from peftplan.errors import OutsideError, PeftplanError, RequestError, Unsupported
from peftplan.hardware import find_gpu
from peftplan.instruments import build, gpu, history, limits, quantize
from peftplan.instruments.gauge import CpuGauge, CudaGauge, Gauge
from peftplan.instruments.hooks import quiet
from peftplan.instruments.loop import Loop
from peftplan.instruments.request import Settings, fingerprint
from peftplan.instruments.step import versions
from peftplan.instruments.trace import assembled
from peftplan.job import Job
from peftplan.pipeline import VERSION, estimate
from peftplan.process import AllocatorKnobs, allocator_conf, allocator_knobs, load_knobs
from peftplan.records import Measured, MemoryKind, Record, Run

STEADY = ("forward", "loss", "backward", "optimizer")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch and CUDA say where they lack memory, in whatever class of error."""
_PHASES: tuple[tuple[MemoryKind, tuple[str, ...]], ...] = (
    ("allocated_peak_load", ("load",)),
    ("allocated_peak_forward", ("forward", "loss")),
    ("allocated_peak_loss", ("loss",)),
    ("allocated_peak_backward", ("backward",)),
    ("allocated_peak_optimizer", ("optimizer",)),
)


@dataclass(kw_only=True)
class Finding:
    """What a run has told so far."""

    gauge: Gauge
    knobs: AllocatorKnobs
    trainable: int | None = None
    seconds: tuple[float, ...] = ()
    working: gpu.Card | None = None
    """The card while steps ran."""
    failed_in: str | None = None
    before: gpu.Card | None = None
    """The card before the process was on it."""
    stats: dict[str, Any] = field(default_factory=dict)


class NoDevice(OutsideError):
    """This machine has no such device, so that no other job will find one."""


class _Run(Loop):
    """A loop whose phases go to a gauge; those of warm-up steps under names of their own."""

    gauge: Gauge
    prefix = "warm-up "
    at = "load"

    def phase(self, name: str) -> None:
        self.at = name
        self.gauge.begin(self.prefix + name)

    def whole_step(self) -> None:
        """An optimizer step with all its micro-batches."""
        for _ in range(self.job.grad_accum - 1):
            self._micro_step()
        self._step()


def measure(job: Job, settings: Settings, *, identity: str, campaign: str) -> Record:
    """Runs `job` and returns its record; one that ran out of memory says so.

    Raises RequestError for a job that cannot be run, OutsideError where there is no such device or the libraries fail.
    """
    resolved = _resolved(job, settings.device)
    found = _ready(resolved, settings)
    try:
        with quiet(), limits.host(settings.limit_bytes if settings.device == "cpu" else None):
            _watch(resolved, settings, found)
    except Exception as error:
        if not lacks_memory(error):
            raise _told(error) from error
        found.failed_in = found.failed_in or "load"
    return _record((job, resolved), settings, found, (identity, campaign))


def lacks_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, says that memory ran out."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(s in str(error) for s in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def _told(error: Exception) -> PeftplanError:
    if isinstance(error, PeftplanError):
        return error
    line = (str(error).strip().splitlines() or [""])[0]
    return OutsideError(f"the real model fails in this run: {type(error).__name__}: {line}")


def _resolved(job: Job, device: str) -> Job:
    """`job` with every default decided. Raises Unsupported for what one process on one device does not run."""
    backend = "cuda" if device == "cuda" else "cpu"
    resolved = estimate(job.model_copy(update={"backend": backend})).job
    alone = {"layout": "none", "offload": "none", "kernels": "hf", "task": "train"}
    for name, usual in alone.items():
        value = getattr(resolved, name)
        if value not in (None, usual):
            raise Unsupported(f"--{name} {value}: a run is one process with transformers' own kernels; leave it out")
    if resolved.gpus * resolved.nodes > 1:
        raise Unsupported("--gpus: a run is one process on one device")
    if resolved.knobs("loop").get("ema", "none") != "none":
        raise Unsupported("loop.ema: a run keeps no average of weights; leave it out")
    if load_knobs(resolved).threads:
        raise Unsupported("load.threads: a run loads its weights one after another")
    return resolved


def _ready(job: Job, settings: Settings) -> Finding:
    """The device, with the job's allocator on it. Raises OutsideError where there is none."""
    knobs = allocator_knobs(job)
    if settings.device == "cpu":
        return Finding(gauge=CpuGauge(), knobs=knobs)
    before = gpu.read()
    if not torch.cuda.is_available():
        raise NoDevice("--device cuda: torch sees no GPU here; --device meta needs none")
    torch.cuda.init()
    if allocator_conf(knobs):
        torch.cuda.memory._set_allocator_settings(allocator_conf(knobs))
    if settings.limit_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, settings.limit_bytes / total))
    return Finding(gauge=CudaGauge(), knobs=knobs, before=before)


def _watch(job: Job, settings: Settings, found: Finding) -> None:
    """Load, warm up, read one step, time the others."""
    gauge, run = found.gauge, None
    choices = build.decide(job, build.CUDA_ATTENTION if settings.device == "cuda" else build.CPU_ATTENTION)
    _clean(choices)
    try:
        with history.recording(settings.history), gauge.watching():
            gauge.begin("load")
            model = assembled(choices, "real", torch.device(settings.device))
            found.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            run = _Run(choices, model, torch.device(settings.device))
            run.gauge = gauge
            gauge.begin("loaded")
            with run._losses(), run._kernels():
                _warm_up(run, settings, found.knobs)
                run.prefix = ""
                run.whole_step()
            gauge.begin("between")
        with run._kernels():
            _time(run, settings, found)
    except Exception:
        found.failed_in = run.at if run is not None else "load"
        raise
    if settings.device == "cuda":
        found.stats = torch.cuda.memory_stats()


def _clean(choices: build.Choices) -> None:
    """Nothing that is not the run's is made or freed during it: libraries make tensors as they are imported, and what
    an earlier run left is garbage."""
    for library, wanted in (("peft", choices.wrapped), ("bitsandbytes", choices.quantized)):
        if wanted:
            importlib.import_module(library)
    if choices.quantized:
        quantize.make_tables()
    gc.collect()


def _warm_up(run: _Run, settings: Settings, knobs: AllocatorKnobs) -> None:
    for number in range(settings.warm_up):
        shorter = knobs.seq_len_before is not None and number == settings.warm_up - 1
        run.seq_len = knobs.seq_len_before if shorter and knobs.seq_len_before else run.choices.seq_len
        run.whole_step()
        _between(knobs, run.device)
    run.seq_len = run.choices.seq_len


def _between(knobs: AllocatorKnobs, device: torch.device) -> None:
    if knobs.empty_cache and device.type == "cuda":
        torch.cuda.empty_cache()


def _time(run: _Run, settings: Settings, found: Finding) -> None:
    run.phase = lambda name: setattr(run, "at", name)  # type: ignore[method-assign]
    marks = [found.gauge.mark()]
    for _ in range(settings.timed):
        run.whole_step()
        _between(found.knobs, run.device)
        marks.append(found.gauge.mark())
    found.seconds = found.gauge.seconds(marks)

    def work() -> None:
        run.whole_step()
        torch.cuda.synchronize()

    if settings.device == "cuda":
        found.working = gpu.read(work)


# -- the record -------------------------------------------------------------------------------------------------------


def _record(jobs: tuple[Job, Job], settings: Settings, found: Finding, name: tuple[str, str]) -> Record:
    """Of the job as asked and as resolved; `name` is its id and its campaign."""
    (asked, job), (identity, campaign) = jobs, name
    card = found.working or found.before
    outside, how = _outside(found) if settings.device == "cuda" and found.failed_in is None else (None, "")
    return Record(
        id=identity,
        kind="cuda" if settings.device == "cuda" else "traced",
        source="peftplan profile",
        source_rev=VERSION,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        campaign=campaign,
        gpu=_card_name(settings, card),
        job=_stated(job, settings, card),
        out_of_memory=found.failed_in is not None,
        measured=() if found.failed_in is not None else _measured(found, outside),
        setup_known="full",
        trainable_params=found.trainable,
        notes="random weights; reserved_peak is that of the step that was read",
        versions=", ".join(
            f"{name} {text}" for name, text in {**versions(), "python": platform.python_version()}.items()
        ),
        run=_run(fingerprint(asked, settings), settings, found, (outside, how)),
    )


def _card_name(settings: Settings, card: gpu.Card | None) -> str:
    if settings.device == "cpu":
        return "none (CPU)"
    name = card.name if card is not None else str(torch.cuda.get_device_name())
    limited = settings.limit_bytes is not None
    return f"{name}, limited to {settings.limit_bytes:,} bytes" if limited else name


def _stated(job: Job, settings: Settings, card: gpu.Card | None) -> dict[str, Any]:
    """The whole job; its card where the catalog knows it and all of it could be used."""
    short = None
    if settings.device == "cuda" and card is not None and settings.limit_bytes is None:
        try:
            short = find_gpu(card.name).name
        except RequestError:
            short = None
    stated = job.model_copy(update={"gpu": short})
    return stated.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"remarks", "extras", "trainer"})


def _measured(found: Finding, outside_bytes: int | None) -> tuple[Measured, ...]:
    peaks = found.gauge.peaks
    steady = [phase for phase in STEADY if phase in peaks]
    values: list[tuple[MemoryKind, int]] = [("allocated_peak", max(peaks[phase] for phase in steady))]
    if found.gauge.reserved:
        reserved = max(found.gauge.reserved[phase] for phase in steady)
        values.append(("reserved_peak", reserved))
        values += [("device", reserved + outside_bytes)] if outside_bytes is not None else []
    values.append(("allocated_resident", found.gauge.began["loaded"]))
    values.append(("allocated_between_steps", found.gauge.began["between"]))
    for kind, phases in _PHASES:
        known = [peaks[phase] for phase in phases if phase in peaks]
        values += [(kind, max(known))] if known else []
    return tuple(Measured(kind=kind, bytes=size) for kind, size in values)


def _outside(found: Finding) -> tuple[int | None, str]:
    """What the process holds outside the caching allocator, and how that was read."""
    held = torch.cuda.memory_reserved()
    if found.before is not None and found.working is not None:
        before, now = found.before.used_bytes, found.working.used_bytes
        if before is not None and now is not None and now - before > held:
            return now - before - held, "nvidia-smi memory.used, less what it was before this process, less reserved"
    free, total = torch.cuda.mem_get_info()
    return total - free - held, "cudaMemGetInfo of the whole card, less reserved"


def _run(asked: str, settings: Settings, found: Finding, outside: tuple[int | None, str]) -> Run:
    working, card = found.working, found.working or found.before
    return Run(
        asked=asked,
        warm_up_steps=settings.warm_up,
        step_seconds=found.seconds,
        before_loss_bytes=found.gauge.peaks.get("forward"),
        outside_bytes=outside[0],
        outside_read=outside[1],
        requested_bytes=found.stats.get("requested_bytes.all.peak"),
        retries=found.stats.get("num_alloc_retries"),
        settings=allocator_conf(found.knobs) if settings.device == "cuda" else "",
        limit_bytes=settings.limit_bytes,
        failed_in=found.failed_in,
        driver=card.driver if card is not None else "",
        cuda=torch.version.cuda or "",
        sm_clock_mhz=working.sm_clock_mhz if working else None,
        memory_clock_mhz=working.memory_clock_mhz if working else None,
        power_watts=working.power_watts if working else None,
        temperature_celsius=working.temperature_celsius if working else None,
    )
