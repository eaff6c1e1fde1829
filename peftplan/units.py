"""Units: element types and their bytes, byte and FLOP formatting. 1 MAC = 2 FLOPs everywhere."""

from __future__ import annotations

import re
from enum import Enum

from peftplan.errors import RequestError

KIB, MIB, GIB = 2**10, 2**20, 2**30


class DType(Enum):
    """An element type; the value is (name, bits per element)."""

    float64 = ("float64", 64)
    float32 = ("float32", 32)
    bfloat16 = ("bfloat16", 16)
    float16 = ("float16", 16)
    float8 = ("float8", 8)
    complex64 = ("complex64", 64)
    int64 = ("int64", 64)
    int32 = ("int32", 32)
    int8 = ("int8", 8)
    uint8 = ("uint8", 8)
    boolean = ("bool", 8)

    def __init__(self, label: str, bits: int) -> None:
        self.label = label
        self.bits = bits
        self.size = bits // 8
        """Bytes per element."""
        self.is_half = label in ("bfloat16", "float16")

    __hash__ = object.__hash__  # there is one of each; Enum's own hashes its name

    @property
    def is_float(self) -> bool:
        return self.label.startswith(("float", "bfloat"))


_SPELLINGS = {
    "fp32": DType.float32,
    "float": DType.float32,
    "bf16": DType.bfloat16,
    "fp16": DType.float16,
    "half": DType.float16,
    "fp8": DType.float8,
}


def parse_dtype(text: str) -> DType:
    """The element type that `text` (`bf16`, `torch.bfloat16`, `float32`, ...) names.

    Raises RequestError for an unknown name.
    """
    name = text.removeprefix("torch.").lower()
    if name in _SPELLINGS:
        return _SPELLINGS[name]
    if name in DType.__members__:
        return DType[name]
    known = ", ".join([*_SPELLINGS, *DType.__members__])
    raise RequestError(f"unknown dtype {text!r}; use one of {known}")


def promote(a: DType, b: DType) -> DType:
    """The result type of an elementwise op on two floating tensors (torch.promote_types)."""
    if a is b:
        return a
    if a.bits != b.bits:
        return a if a.bits > b.bits else b
    return DType.float32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(value: int, multiple: int) -> int:
    return ceil_div(value, multiple) * multiple


_BYTE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes from `24GB` (decimal), `22.5GiB` (binary) or a plain number. Raises RequestError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match.group(2).lower() not in _BYTE_UNITS:
        raise RequestError(f"cannot read {text!r} as a size; write it like 24GB or 22.5GiB")
    return int(float(match.group(1)) * _BYTE_UNITS[match.group(2).lower()])


def format_bytes(value: int) -> str:
    """`value` bytes for people: binary units, three significant digits."""
    for unit, size in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value} B"


def format_count(value: float) -> str:
    """A large count for people: 6.74 B, 33.6 M."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:g}"
