"""How long a step takes: a roofline over its kernels, as an interval.

Every kernel takes the longer of its arithmetic and its memory traffic (Williams 2009, roofline); kernels
follow each other on one stream; a pass over a region takes at least what the host needs to launch its
kernels.

`low` runs at the card's dense peak and full bandwidth, launches for free, keeps in cache all that fits
there (twice the L2 per kernel: what it reads and what it writes), skips the masked half of attention and
touches weights, gradients and states once in the optimizer: no eager step of these kernels is faster. Where
the cache is unknown, only matrix products count. `expected` uses the achieved fractions below, `high` is
SPREAD times `expected`.

Fitted on (2026-11-21): 8 single-A100 runs of foundation-model-stack/fms-acceleration (Mistral-7B, full,
LoRA and QLoRA, 4096 tokens; 2024-05 to 2025-02) and 44 T4 runs of fitcheck-llm 0.3.1 (LoRA and QLoRA, 0.1
to 7 B parameters; 2026-09). Judged on 35 runs of other sources: PEFT's MetaMathQA on L40S,
VectorInstitute/vectorlm on A100, ljm565/universal-llm-trainer on A100, H100 and RTX PRO 6000. No number was
fitted on them, but they were seen before OF_PEAK, HOST_SECONDS and the trainer's unstated padding mask were
settled, so they judge less than blind runs would. Left out of it: that trainer's QLoRA rows (compute dtype
unstated, five times slower than LoRA) and its 13 B full fine-tuning (does not fit the card by itself).
`tests/step_times.jsonl` holds all runs, and tests/test_clock.py the errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peftplan.hardware.gpus import Gpu, Rate
from peftplan.step.work import Kernel, Pass
from peftplan.units import DType

OF_MEASURED = 0.84
"""Fraction of the fastest matrix product measured on a card that a model's products reach; fms, A100
(median ratio)."""
CARD_FRACTIONS = {"NVIDIA T4": 0.29}
"""Fractions of dense peak fitted for one card; fitcheck. A T4 draws 70 W and throttles."""
OF_PEAK = 0.44
"""Where no fast product was measured: the geometric mean of the T4's 0.29 and of OF_MEASURED times the
catalog's measured fractions (0.80 of peak, median); errs either way by half."""
OF_FP32 = 0.50
"""fp32 products run on the CUDA cores (torch.backends.cuda.matmul.allow_tf32 is false by default);
fitcheck."""
FLASH = 0.60
"""Flash attention, of dense peak, both ways; Dao 2023 (arXiv:2307.08691, figures 4 and 5): 50 to 73 % on
A100."""
EFFICIENT = 0.23
"""The memory-efficient kernel, which sdpa takes with a mask, in fp32 or before compute capability 8.0;
fitcheck."""
BANDWIDTH = 0.80
"""Of the card's memory bandwidth; start value of the fit, which did not move it."""
TO_HOST = 0.80
"""Of PCI Express' bytes per second in one direction, for pinned memory; taken to be BANDWIDTH's: no timed run of the
profiles offloads. Errs either way."""
HOST_SECONDS = 16e-6
"""Host time per launched kernel, autograd and modules included. The geometric mean of 7 us for the plainest
op (github.com/pytorch/pytorch issue 41383, 2020-07) and the 39 us that fitcheck's smallest models on T4
machines need."""
MULTI_TENSOR_PASSES = 23 / 7
"""Traffic of torch's foreach AdamW with gradient clipping over a single pass: 20 reads and writes of a
weight-sized tensor (torch 2.13, torch/optim/adam.py, _multi_tensor_adam) and 3 for clip_grad_norm_, where
one pass has 7."""
SPREAD = 2.2
"""high / expected: the worst miss of the fitted runs (a 135 M model on T4, host-bound, measured 2.2 times
expected)."""
ACCURACY = (
    "achieved fractions fitted on A100 and T4 runs; 35 other runs on A100, H100, L40S and RTX PRO 6000 lie "
    "within the interval, and miss expected by 18 % (median), at worst by 46 % (expected too low)"
)
"""What tests/test_clock.py holds the judged half to."""

_RATES: dict[DType, Rate] = {
    DType.float32: "fp32",
    DType.bfloat16: "bf16",
    DType.float16: "fp16",
    DType.float8: "fp8",
    DType.int8: "int8",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionKernel:
    """Which fused kernel runs: `half` is the element type of one that has no fp32 form, None where it has."""

    flash: bool
    skips_masked: bool
    half: DType | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerTraffic:
    """Bytes of what the optimizer step reads and writes; `fused` where one kernel passes over them once."""

    weight_bytes: int
    state_bytes: int
    fused: bool

    @property
    def once_bytes(self) -> int:
        """Weights and states read and written, gradients (of the weights' size) read."""
        return 3 * self.weight_bytes + 2 * self.state_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimizer step; `compute`, `memory`, `launching` (waits for the host) and `offload` (copies to the
    host and back) sum to `expected`."""

    low: float
    expected: float
    high: float
    compute: float
    memory: float
    launching: float
    offload: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """Why there is no time."""

    why: str


def attention_kernel(name: str, *, masked: bool, gpu: Gpu, compute: DType) -> AttentionKernel:
    """The kernel that an attention implementation comes to on this card."""
    if name.startswith("flash"):
        return AttentionKernel(flash=True, skips_masked=True, half=compute if compute.is_half else DType.bfloat16)
    old = gpu.capability is not None and gpu.capability < (8, 0)
    flash = name != "sdpa_efficient" and not (masked or old)
    return AttentionKernel(flash=flash, skips_masked=not masked)


def cache_bytes(gpu: Gpu) -> int | None:
    """How much of a kernel's traffic the L2 may spare: what it reads and what it writes; None where unknown."""
    return 2 * gpu.l2_bytes if gpu.l2_bytes is not None else None


def step_time(
    runs: Iterable[Pass],
    gpu: Gpu,
    *,
    attention: AttentionKernel,
    optimizer: OptimizerTraffic,
    micro_batches: int,
) -> StepTime | Unknown:
    """Seconds of `micro_batches` times the passes `runs` (for this card's `cache_bytes`) and one optimizer step."""
    meter = metered(runs, gpu, attention=attention)
    return meter if isinstance(meter, Unknown) else meter.total(optimizer, micro_batches)


def metered(runs: Iterable[Pass], gpu: Gpu, *, attention: AttentionKernel) -> Meter | Unknown:
    """The seconds of one micro-batch on one card; `total` adds an optimizer to them."""
    if gpu.kind != "gpu":
        return Unknown(why=f"{gpu.name} is no GPU: its compiler fuses ops, which the clock does not model")
    meter = Meter(gpu, attention)
    for run in runs:
        meter.add(run)
    if meter.missing:
        return Unknown(why=f"{gpu.name}: its peak rate in {meter.missing} is unknown, or it has none")
    if meter.to_host and gpu.pcie is None:
        return Unknown(why=f"{gpu.name}: how fast it copies to host memory is unknown")
    return meter


def _computed_in(kernel: Kernel, attention: AttentionKernel) -> DType:
    if kernel.attention and attention.half is not None and not kernel.dtype.is_half:
        return attention.half
    return kernel.dtype


class Meter:
    """Adds up the seconds of the passes of one micro-batch."""

    def __init__(self, gpu: Gpu, attention: AttentionKernel) -> None:
        self.gpu = gpu
        self.attention = attention
        self.low = self.compute = self.memory = self.launching = 0.0
        self.to_host = self.beside = 0
        self._bandwidth = gpu.bandwidth_bytes_per_second
        self._achieved = BANDWIDTH * self._bandwidth
        self._rates: dict[tuple[str, bool], tuple[float, float]] = {}
        self.missing = ""
        """The element type whose peak is unknown, if one came up."""

    def add(self, run: Pass) -> None:
        low = run.beyond_cache_bytes / self._bandwidth
        compute, memory = 0.0, run.plain_bytes / self._achieved
        for k in run.products:
            peak, achieved = self._rate(k)
            moving = k.moved_bytes / self._achieved
            computing = k.flops / achieved
            low += k.flops / peak
            if computing >= moving:
                compute += computing
            else:
                memory += moving
        if run.host_bytes:
            self.to_host += run.count * run.host_bytes
            self.beside += run.count * run.host_bytes * run.beside
        self.low += run.count * low
        self.compute += run.count * compute
        self.memory += run.count * memory
        self.launching += run.count * max(0.0, run.launches * HOST_SECONDS - compute - memory)

    def total(self, optimizer: OptimizerTraffic, micro_batches: int) -> StepTime:
        times = 1.0 if optimizer.fused else MULTI_TENSOR_PASSES
        memory = micro_batches * self.memory + times * optimizer.once_bytes / self._achieved
        compute, launching = micro_batches * self.compute, micro_batches * self.launching
        waiting = micro_batches * self._waiting(TO_HOST, self.compute + self.memory)
        expected = compute + memory + launching + waiting
        return StepTime(
            low=micro_batches * self.low
            + optimizer.once_bytes / self._bandwidth
            + micro_batches * self._waiting(1.0, self.low),
            expected=expected,
            high=SPREAD * expected,
            compute=compute,
            memory=memory,
            launching=launching,
            offload=waiting,
        )

    def _waiting(self, achieved: float, working: float) -> float:
        """Seconds that one micro-batch waits for copies to the host: all of those on the stream that computes, and of
        those beside it what lasts longer than the `working` seconds."""
        if not self.to_host or self.gpu.pcie is None:
            return 0.0
        rate = achieved * self.gpu.pcie.bytes_per_second
        return (self.to_host - self.beside) / rate + max(0.0, self.beside / rate - working)

    def _rate(self, kernel: Kernel) -> tuple[float, float]:
        """FLOPs as counted per second: (no kernel is faster, expected)."""
        key = (kernel.dtype.label, kernel.attention)  # an Enum's own hash is slow
        found = self._rates.get(key)
        if found is None:
            found = self._rates[key] = self._find(kernel)
        return found

    def _find(self, kernel: Kernel) -> tuple[float, float]:
        dtype = _computed_in(kernel, self.attention)
        peak = peak_flops(self.gpu, dtype)
        if peak is None:
            self.missing = dtype.label
            return 1.0, 1.0
        if not kernel.attention:
            return peak, achieved_flops(self.gpu, dtype)
        if dtype is DType.float32:
            peak = max(peak, _fast_fp32_flops(self.gpu))
        done = 0.5 if self.attention.skips_masked else 1.0
        flash = self.attention.flash and dtype.is_half  # no flash kernel computes in fp32
        return peak / 0.5, peak * (FLASH if flash else EFFICIENT) / done


def _fast_fp32_flops(gpu: Gpu) -> float:
    """Rate of the memory-efficient kernel in fp32: from Ampere on, three tf32 products on the tensor cores
    for each fp32 product (OpMultiplyAddFastF32 in torch 2.13's
    aten/src/ATen/native/transformers/cuda/mem_eff_attention/gemm_kernel_utils.h); 0 on other cards. Its
    achieved fraction is taken from half precision: no timed run tells."""
    ampere = gpu.capability is not None and gpu.capability >= (8, 0)
    return gpu.dense_tflops.get("tf32", 0.0) * 1e12 / 3 if ampere else 0.0


def peak_flops(gpu: Gpu, dtype: DType) -> float | None:
    """Dense peak in FLOPs per second; None where it is unknown or the card has none."""
    rate = _RATES.get(dtype)
    return gpu.dense_tflops[rate] * 1e12 if rate is not None and rate in gpu.dense_tflops else None


def is_measured(gpu: Gpu) -> bool:
    """Whether the fraction of peak that products reach on this card was measured rather than assumed."""
    return gpu.name in CARD_FRACTIONS or gpu.measured_bf16_tflops is not None


def achieved_flops(gpu: Gpu, dtype: DType) -> float:
    """Matrix-product FLOPs per second that a model is expected to reach; `dtype` must have a peak."""
    peak = gpu.dense_tflops[_RATES[dtype]] * 1e12
    if dtype is DType.float32:
        return OF_FP32 * peak
    if gpu.name in CARD_FRACTIONS:
        return CARD_FRACTIONS[gpu.name] * peak
    if gpu.measured_bf16_tflops is not None and "bf16" in gpu.dense_tflops:
        return OF_MEASURED * gpu.measured_bf16_tflops / gpu.dense_tflops["bf16"] * peak
    return OF_PEAK * peak
