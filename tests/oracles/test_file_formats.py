"""Formats that transformers unpacks as it loads: what their files hold, and that a plain base trains."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import formats
from peftplan.errors import RequestError
from peftplan.formats._dequantized import Dequantized
from peftplan.formats._ggml import BASE, BLOCKS
from peftplan.formats.gguf import Gguf
from peftplan.graph.blocks.decoder import decoder
from peftplan.graph.core import Tensor
from peftplan.job import make_job
from peftplan.pipeline import estimate, read
from peftplan.units import DType
from tests.conformance import zoo

NAMES = [name for name in formats.names() if issubclass(formats.get(name), Dequantized)]
LLAMA_3_1_8B = {
    "IQ1_S": 2.0042, "IQ1_M": 2.1460, "IQ2_XXS": 2.3824, "IQ2_XS": 2.5882, "IQ2_S": 2.7403, "IQ2_M": 2.9294,
    "IQ3_XXS": 3.2548, "IQ3_XS": 3.4977, "IQ3_S": 3.6606, "IQ3_M": 3.7628, "IQ4_XS": 4.4597, "IQ4_NL": 4.6818,
    "Q2_K_S": 2.9697, "Q2_K": 3.1593, "Q3_K_S": 3.6429, "Q3_K_L": 4.2979, "Q4_K_S": 4.6672, "Q4_K_M": 4.8944,
    "Q5_K_S": 5.5704, "Q5_K_M": 5.7036, "Q6_K": 6.5633, "Q8_0": 8.5008, "F16": 16.0005,
}  # fmt: skip
"""Bits a weight of files made by llama.cpp (tools/quantize/README.md at 311c2c9, meta-llama/Llama-3.1-8B)."""


def matrix(rows: int, columns: int) -> Tensor:
    return Tensor("w", (rows, columns), DType.bfloat16)


@pytest.mark.parametrize("file_type", LLAMA_3_1_8B)
def test_files_of_llama_cpp_are_as_large_as_it_says(file_type: str) -> None:
    fmt: Any = formats.make("gguf", {"file_type": file_type, "imatrix": file_type[:3] in ("IQ1", "IQ2", "IQ3")})
    reading = read(make_job(model="meta-llama/Llama-3.1-8B", method="full", format="gguf"))
    bits = 8 * fmt.model_bytes(decoder(reading.case.arch, reading.case.setup)) / reading.estimate.parameters.total
    assert bits == pytest.approx(LLAMA_3_1_8B[file_type], abs=1e-4)


@pytest.mark.parametrize("model", zoo.MODELS)
def test_a_file_in_full_precision_holds_every_parameter(model: str) -> None:
    reading = read(zoo.job(model, {}))
    graph = decoder(reading.case.arch, reading.case.setup)
    assert Gguf(file_type="F32").model_bytes(graph) == 4 * reading.estimate.parameters.total


def test_rows_that_blocks_do_not_divide_take_another_type() -> None:
    assert Gguf().file_bytes(matrix(10, 256)) == 10 * 144
    assert Gguf().file_bytes(matrix(10, 288)) == 10 * 288 // 32 * 22
    assert Gguf().file_bytes(matrix(10, 100)) == 10 * 100 * 2


def test_blocks_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {kind.name: tuple(size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {name: theirs[name] for name in BLOCKS} == BLOCKS
    files = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    assert set(BASE) <= files
    assert set(BASE.values()) <= set(BLOCKS)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_the_gguf_package_packs_to_the_bytes_predicted(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    rows = numpy.random.default_rng(0).standard_normal((33, 96)).astype("float32")
    packed = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
    assert Gguf(file_type=kind if kind in BASE else "Q5_1").file_bytes(matrix(33, 96)) == packed.nbytes


@pytest.mark.trace
@pytest.mark.parametrize("shape", [(48, 256), (104, 128), (33, 384)])
@pytest.mark.parametrize(
    ("preset", "name", "knobs"),
    [
        ("W4A16", "compressed_tensors", {}),
        ("W4A16_ASYM", "compressed_tensors", {"symmetric": False}),
        ("W8A16", "compressed_tensors", {"scheme": "w8a16"}),
        ("W8A8", "compressed_tensors", {"scheme": "w8a8"}),
        ("FP8_DYNAMIC", "compressed_tensors", {"scheme": "fp8"}),
        ("NVFP4", "nvfp4", {}),
        ("MXFP4A16", "mxfp4", {}),
    ],
)
def test_compressed_tensors_packs_to_the_bytes_predicted(
    preset: str, name: str, knobs: dict[str, Any], shape: tuple[int, int]
) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    rows, columns = shape
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
    config = QuantizationConfig(config_groups={"all": preset_name_to_scheme(preset, ["Linear"])})
    apply_quantization_config(model, config)
    ModelCompressor(quantization_config=config).compress_model(model)
    fmt: Any = formats.make(name, knobs)
    assert fmt.file_bytes(matrix(rows, columns)) == sum(t.nbytes for t in model.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_what_trains_is_a_plain_base(name: str) -> None:
    fields = {"method": "lora", "target_modules": ("q_proj",)}
    plain, loaded = (estimate(zoo.job("round", {**fields, **more})) for more in ({}, {"format": name}))
    assert loaded.memory.peak_bytes == plain.memory.peak_bytes
    assert loaded.parameters == plain.parameters
    assert any("unpacks" in said.why for said in loaded.assumptions)


@pytest.mark.parametrize("name", NAMES)
def test_packed_it_does_not_train(name: str) -> None:
    with pytest.raises(RequestError, match=r"format.dequantize=false: .*; leave it out"):
        estimate(zoo.job("round", {"method": "lora", "format": name, "set": {"format.dequantize": False}}))


@pytest.mark.parametrize(("name", "columns"), [("nvfp4", 24), ("mxfp4", 48)])
def test_rows_of_broken_blocks_are_refused(name: str, columns: int) -> None:
    fmt: Any = formats.make(name, {})
    with pytest.raises(RequestError, match=rf"not {columns}; use"):
        fmt.file_bytes(matrix(8, columns))


def test_unknown_file_types_are_refused() -> None:
    with pytest.raises(RequestError, match=r"format\.file_type='Q9': use one of"):
        Gguf(file_type="Q9").file_bytes(matrix(1, 256))
