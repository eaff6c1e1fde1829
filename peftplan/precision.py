"""Which dtypes a job computes in and holds weights in."""

from __future__ import annotations

from dataclasses import replace

from peftplan import formats
from peftplan.arch.core import Arch
from peftplan.errors import RequestError, Unsupported
from peftplan.formats import Format
from peftplan.graph.blocks.setup import WeightTypes
from peftplan.hardware.find import find_gpu
from peftplan.job import Job
from peftplan.methods import Method
from peftplan.notes import Notes
from peftplan.plugins import canonical
from peftplan.units import DType, parse_dtype

_SHORT = {DType.bfloat16: "bf16", DType.float16: "fp16", DType.float32: "fp32", DType.float64: "fp64"}


def precision_of(job: Job, arch: Arch, notes: Notes, method: Method) -> tuple[DType, DType | None, str]:
    """(weight dtype, autocast dtype or None, the precision's name)."""
    asked = (job.precision or "").lower().replace("_", "-")
    if asked in ("tf32", "fp32", "float32"):
        asked = "fp32"
    if asked in ("fp8", "float8"):
        dtype = _float8(job, method)
        notes.add(
            "precision", "fp8", "torchao's float8 layers, one scale a tensor, without torch.compile, which errs high"
        )
        return dtype, None, "fp8"
    base, mixed = asked.removesuffix("-mixed"), asked.endswith("-mixed")
    if asked and base not in ("bf16", "fp16", "fp32", "bfloat16", "float16"):
        raise Unsupported(
            f"--precision {job.precision} is not modelled; use bf16, fp16, fp32, fp8, bf16-mixed or fp16-mixed"
        )
    if mixed and base == "fp32":
        raise RequestError("--precision fp32-mixed: autocast needs a half precision; use bf16-mixed or fp16-mixed")
    _agree(job)
    stated = job.dtype or (job.format if job.format and canonical(job.format) in ("bf16", "fp16", "fp32") else None)
    if mixed:
        own_copies = method.trains != "base" or method.masters is not None
        dtype = parse_dtype(stated) if stated else (arch.dtype if own_copies else DType.float32)
        if stated is None:
            why = "mixed precision trains fp32 weights" if dtype is DType.float32 else "the base keeps its dtype"
            notes.add("dtype", dtype.label, why)
        return dtype, parse_dtype(base), asked
    if stated is not None:
        dtype = parse_dtype(stated)
    elif asked:
        dtype = parse_dtype(base)
    else:
        dtype = arch.dtype
        notes.add("dtype", dtype.label, "the dtype the checkpoint states (from_pretrained's default)")
    if asked and parse_dtype(base) is not dtype:
        why = f"weights of their own dtype compute in it; autocast would be --precision {base}-mixed"
        notes.add("precision", _SHORT[dtype], why)
    return dtype, None, _SHORT[dtype]


def _float8(job: Job, method: Method) -> DType:
    """The dtype of the weights whose products are torchao's float8 ones. Raises where that is not modelled."""
    _agree(job)
    if method.trains != "base" or method.masters is not None:
        raise Unsupported(f"--precision fp8 with {job.method} is not modelled; it is for methods that train the base")
    stated = job.dtype or (job.format if job.format and canonical(job.format) in ("bf16", "fp16", "fp32") else "bf16")
    if job.format is not None and formats.get(job.format)().packed:
        raise RequestError(f"--precision fp8: the weights of --format {job.format} do not train; leave it out")
    gpu = find_gpu(job.gpu) if job.gpu is not None else None
    if gpu is not None and gpu.capability is not None and gpu.capability < (8, 9):
        raise RequestError(f"--precision fp8 needs a GPU of compute capability 8.9 or newer, which {gpu.name} is not")
    dtype = parse_dtype(stated)
    if dtype is not DType.bfloat16:
        raise Unsupported(f"--precision fp8 of {dtype.label} weights is not modelled; use --dtype bf16")
    return dtype


def _agree(job: Job) -> None:
    """--dtype and an unpacked --format say the same thing, or it is a mistake."""
    if job.dtype is None:
        return
    stated = float_dtype("--dtype", job.dtype)
    plain = formats.get(job.format)().dtype() if job.format is not None else None
    if plain is not None and plain is not stated:
        raise RequestError(f"--dtype {job.dtype} contradicts --format {job.format}; give one of them")


def float_dtype(option: str, text: str) -> DType:
    """The floating dtype, of at least 16 bits, that an option names."""
    dtype = parse_dtype(text)
    if not dtype.is_float or dtype.bits < 16:
        raise Unsupported(f"{option} {text} is not modelled; use bf16, fp16 or fp32")
    return dtype


def weight_types(dtype: DType, compute: DType, fmt: Format) -> WeightTypes:
    """peft.prepare_model_for_kbit_training casts every half-precision weight that is not packed to fp32."""
    if not (fmt.packed and fmt.upcasts_rest):
        return replace(WeightTypes.all(dtype), bias=fmt.bias_dtype(compute, dtype))
    rest = DType.float32
    ends = rest if fmt.upcasts_ends else DType.bfloat16
    return WeightTypes(linear=dtype, norm=rest, embedding=ends, head=ends, bias=fmt.bias_dtype(compute, rest))
