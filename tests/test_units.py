"""Units: dtypes, sizes, formatting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftplan.errors import RequestError
from peftplan.units import DType, ceil_div, format_bytes, format_count, parse_bytes, parse_dtype, promote, round_up


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("bf16", DType.bfloat16), ("torch.float16", DType.float16), ("FP32", DType.float32), ("half", DType.float16)],
)
def test_dtypes_have_the_spellings_people_use(text: str, dtype: DType) -> None:
    assert parse_dtype(text) is dtype


def test_an_unknown_dtype_names_the_known_ones() -> None:
    with pytest.raises(RequestError, match="unknown dtype 'bf17'; use one of fp32"):
        parse_dtype("bf17")


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("22.5GiB", 45 * 2**29), ("1 kib", 1024), ("512", 512), ("0b", 0)]
)
def test_sizes_read_decimal_and_binary(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e3GB", "24 gigs", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="cannot read"):
        parse_bytes(text)


def test_promotion_is_torchs() -> None:
    assert promote(DType.bfloat16, DType.float32) is DType.float32
    assert promote(DType.bfloat16, DType.float16) is DType.float32
    assert promote(DType.float16, DType.float16) is DType.float16


@given(st.integers(0, 10**15), st.integers(1, 10**6))
def test_rounding_up_is_the_smallest_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - value < multiple
    assert ceil_div(value, multiple) * multiple == rounded


def test_numbers_for_people() -> None:
    assert format_bytes(24 * 2**30) == "24.00 GiB"
    assert format_bytes(511) == "511 B"
    assert format_count(6_738_415_616) == "6.74 B"
    assert format_count(12) == "12"
