"""The accelerator and price catalogs: sound rows, the names people use, what a process can use of a card."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest
from pydantic import TypeAdapter

import peftplan.hardware as hardware
from peftplan.errors import PeftplanError, RequestError, UnknownName
from peftplan.hardware import Gpu, Price, find_gpu, gpus, hourly_usd, prices, usable_bytes, variants
from peftplan.hardware.find import spelling
from peftplan.units import GIB

FOLDER = Path(hardware.__file__).parent


@pytest.mark.parametrize(("file", "row"), [("gpus.jsonl", Gpu), ("prices.jsonl", Price)])
def test_every_row_has_the_schema(file: str, row: type) -> None:
    adapter: TypeAdapter[object] = TypeAdapter(row)
    names = {field.name for field in dataclasses.fields(row)}
    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    for line in lines:
        adapter.validate_json(line, strict=True)
        assert set(json.loads(line)) == names


def test_the_catalog_is_whole() -> None:
    assert len(gpus()) >= 110
    assert len(prices()) >= 222
    assert {price.gpu for price in prices()} <= {gpu.name for gpu in gpus()}


@pytest.mark.parametrize("gpu", gpus(), ids=lambda gpu: gpu.name)
def test_rows_are_plausible(gpu: Gpu) -> None:
    memory = gpu.memory
    assert gpu.sources
    assert 1e10 < gpu.bandwidth_bytes_per_second < 1e13
    assert 2015 < gpu.release_year <= 2026
    assert (memory.driver_total_bytes is None) == (memory.driver_total_source is None)
    assert (memory.torch_total_bytes is None) == (memory.torch_total_source is None)
    if memory.driver_total_bytes is not None:
        assert 0.9 < memory.marketed_bytes / memory.driver_total_bytes < 1.05
        assert 0 <= memory.driver_total_bytes - (memory.torch_total_bytes or memory.driver_total_bytes) < 1.1 * GIB
    assert all(rate > 0 for rate in gpu.dense_tflops.values())
    if gpu.measured_bf16_tflops is not None:
        assert gpu.measured_bf16_tflops < gpu.dense_tflops["bf16"]


def test_a_name_means_one_card() -> None:
    meanings: dict[str, set[str]] = defaultdict(set)
    for gpu in gpus():
        for name in (gpu.name, *gpu.aliases):
            meanings[spelling(name)].add(gpu.name)
    assert {name: cards for name, cards in meanings.items() if len(cards) > 1} == {}


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("rtx-4090", "NVIDIA GeForce RTX 4090"),
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("RTX_4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("rtx-4090-24gb", "NVIDIA GeForce RTX 4090"),
        ("RTX 3090 Ti", "NVIDIA GeForce RTX 3090 Ti"),
        ("a100", "NVIDIA A100 SXM4 80GB"),
        ("a100-80gb", "NVIDIA A100 SXM4 80GB"),
        ("A100 80 GB", "NVIDIA A100 SXM4 80GB"),
        ("a100-40gb", "NVIDIA A100 SXM4 40GB"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM4 80GB"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 SXM4 40GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 PCIe 80GB"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100 PCIe 40GB"),
        ("h100", "NVIDIA H100 SXM5 80GB"),
        ("NVIDIA H100 80GB", "NVIDIA H100 SXM5 80GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM5 80GB"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe 80GB"),
        ("h100 94gb", "NVIDIA H100 NVL 94GB"),
        ("NVIDIA H200", "NVIDIA H200 SXM 141GB"),
        ("b200", "NVIDIA B200 SXM"),
        ("l4", "NVIDIA L4"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("l40", "NVIDIA L40"),
        ("t4", "NVIDIA T4"),
        ("Tesla T4", "NVIDIA T4"),
        ("Tesla V100-SXM2-16GB", "NVIDIA V100 SXM2 16GB"),
        ("a10", "NVIDIA A10"),
        ("a10g", "NVIDIA A10G"),
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada"),
        ("AMD Instinct MI300X", "AMD Instinct MI300X"),
        ("Radeon RX 7900 XTX", "AMD Radeon RX 7900 XTX"),
        ("apple-m2-max", "Apple M2 Max"),
    ],
)
def test_names_people_and_drivers_use(name: str, card: str) -> None:
    assert find_gpu(name).name == card


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("a100", {"NVIDIA A100 SXM4 40GB", "NVIDIA A100 PCIe 40GB", "NVIDIA A100 PCIe 80GB"}),
        ("a100-80gb", {"NVIDIA A100 PCIe 80GB"}),
        ("h100", {"NVIDIA H100 PCIe 80GB", "NVIDIA H100 NVL 94GB"}),
        ("v100", {"NVIDIA V100 PCIe 16GB", "NVIDIA V100 SXM2 32GB"}),
        ("a10", set()),
        ("rtx 3080", set()),
        ("l40", set()),
        ("NVIDIA A100-SXM4-80GB", set()),
    ],
)
def test_a_shared_name_lists_its_variants(name: str, others: set[str]) -> None:
    assert {gpu.name for gpu in variants(name)} == others


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("a1000", UnknownName, "did you mean a100, "),
        ("rtx6000", UnknownName, "unknown GPU 'rtx6000'; did you mean rtx a6000, "),
        ("nonsense", UnknownName, "`peftplan list gpus` shows all"),
        ("", UnknownName, "unknown GPU ''"),
        ("8xa100", UnknownName, "write the number of cards as --gpus"),
        ("a100:8", UnknownName, "write the number of cards as --gpus"),
        ("80gb", UnknownName, "unknown GPU '80gb'"),
        (
            "rtx-4060-ti-8gb",
            RequestError,
            "NVIDIA GeForce RTX 4060 Ti 16GB has 16 GB, and the catalog holds no",
        ),
        ("a100-60gb", RequestError, "has 80 GB, and the catalog holds no variant with 60 GB"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, error: type[PeftplanError], line: str) -> None:
    with pytest.raises(error) as caught:
        find_gpu(name)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "gib", "source"),
    [
        ("h100", 79.10, "torch's total: stas00/ml-engineering:debug/pytorch.md"),
        ("h200", 139.80, "torch's total: stas00/ml-engineering:debug/pytorch.md"),
        ("4090", 23.64, "torch's total: recalled"),
        ("b300", 275040 / 1024, "driver's total: skypilot-org/skypilot-catalog"),
        ("gb10", 119.7, "torch's total: recalled"),
        ("trn2", 96e9 / GIB, "marketed size, read as decimal GB"),
    ],
)
def test_usable_memory_and_its_source(name: str, gib: float, source: str) -> None:
    usable = usable_bytes(find_gpu(name))
    assert usable.bytes is not None
    assert usable.bytes / GIB == pytest.approx(gib, abs=0.005)
    assert usable.source.startswith(source)


@pytest.mark.parametrize("gpu", gpus(), ids=lambda gpu: gpu.name)
def test_usable_memory_is_known_or_has_a_reason(gpu: Gpu) -> None:
    usable = usable_bytes(gpu)
    if usable.bytes is None:
        assert gpu.memory.unified
        assert "shares its memory with the CPU" in usable.source
    else:
        assert usable.source


def test_the_hourly_price_is_the_median_row() -> None:
    price = hourly_usd(find_gpu("a10g"))
    assert price is not None
    rows = [row.usd_per_gpu_hour for row in prices() if row.gpu == "NVIDIA A10G"]
    assert (price.usd, price.rows, price.providers) == (median(rows), 13, ("aws",))
    assert price.low_usd <= price.usd <= price.high_usd
    assert "late 2025" in price.note


def test_one_provider_with_many_regions_weighs_once_in_the_provider_median() -> None:
    price = hourly_usd(find_gpu("h100"))
    assert price is not None
    assert price.usd == pytest.approx(6.88)
    assert price.provider_median_usd == pytest.approx(3.22)


def test_rows_without_their_host_are_a_last_resort() -> None:
    t4 = hourly_usd(find_gpu("t4"))
    assert t4 is not None
    assert (t4.rows, t4.providers) == (2, ("azure",))
    assert "billed on top" not in t4.note


def test_no_price_is_none() -> None:
    assert hourly_usd(find_gpu("apple-m1")) is None


def test_prices_add_up() -> None:
    for price in prices():
        per_gpu = price.usd_per_instance_hour / price.gpus_per_instance
        assert price.usd_per_gpu_hour == pytest.approx(per_gpu, rel=1e-3), price
        assert price.source
        assert price.date or price.date_note
