"""A run of the real thing: on the CPU here, what it allocates is what is predicted; a GPU's part with stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.accuracy import compare  # noqa: E402
from peftplan.cli import main  # noqa: E402
from peftplan.errors import BadFile, OutsideError, RequestError, Unsupported  # noqa: E402
from peftplan.instruments import cuda, gpu, history  # noqa: E402
from peftplan.instruments.gauge import CudaGauge  # noqa: E402
from peftplan.instruments.loop import repeated_heads  # noqa: E402
from peftplan.instruments.request import Settings  # noqa: E402
from peftplan.instruments.run import lacks_memory, measure  # noqa: E402
from peftplan.job import Job, make_job  # noqa: E402
from peftplan.pipeline import estimate  # noqa: E402
from peftplan.records import Record, load  # noqa: E402
from peftplan.step.allocator import CachingAllocator  # noqa: E402
from peftplan.units import MIB  # noqa: E402

pytestmark = pytest.mark.trace
TINY: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 88, "vocab_size": 97, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
ONCE = Settings(device="cpu", timed=0)


def tiny(**fields: Any) -> Job:
    return make_job(**{"model": "tiny", "config": TINY, "micro_batch": 3, "seq_len": 17, **fields})


def run(job: Job, settings: Settings = ONCE) -> Record:
    return measure(job, settings, identity="a", campaign="c")


METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "target_modules": "all-linear"},
    "dora": {"method": "dora"},
    "ia3": {"method": "ia3"},
    "vera": {"method": "vera"},
    "adalora": {"method": "adalora", "set": {"method.total_step": 100, "method.trains_ranknum": False}},
    "prompt_tuning": {"method": "prompt_tuning", "set": {"method.num_virtual_tokens": 5}},
    "clipped": {"method": "lora", "set": {"loop.max_grad_norm": 1.0}},
    "nf4": {"method": "lora", "format": "nf4"},
    "int8": {"method": "lora", "format": "int8"},
}
"""AdaLoRA's ranknum trains where PEFT moves or casts an adapter; a float32 model on the CPU gives it no cause."""
EQUAL = ("allocated_peak", "allocated_between_steps", "allocated_peak_loss", "allocated_peak_backward")
STEPS = [*((name, "none") for name in METHODS), *((name, "full") for name in ("full", "lora", "dora", "nf4"))]


@pytest.mark.parametrize(("method", "recompute"), STEPS)
def test_a_real_step_allocates_what_is_predicted(method: str, recompute: str) -> None:
    """As the CPU's allocator counts it, with nobody watching operators. In float32: kernels of half precision have
    buffers of their own on the CPU."""
    record = run(tiny(precision="fp32", recompute=recompute, **METHODS[method]))
    rows = {row.kind: row for row in compare([record], estimate, every_value=True)}
    for kind in EQUAL:
        assert rows[kind].measured_bytes == rows[kind].predicted_bytes, kind


def test_a_record_holds_the_whole_job_and_how_it_went() -> None:
    record = run(tiny(method="dora", grad_accum=2), Settings(device="cpu", timed=1))
    assert (record.kind, record.gpu, record.setup_known, record.out_of_memory) == (
        "traced",
        "none (CPU)",
        "full",
        False,
    )
    assert record.to_job().model_dump()["micro_batch"] == 3
    assert estimate(record.to_job()).job.config == TINY
    assert record.trainable_params == estimate(record.to_job()).parameters.trainable
    assert record.run is not None
    assert len(record.run.step_seconds) == 1
    assert min(record.run.step_seconds) > 0
    assert "torch" in record.versions


REFUSED: dict[str, dict[str, Any]] = {
    "--layout pp=3: a run is one process": {"layout": "pp=3", "gpus": 3, "micro_batch": 4, "grad_accum": 2},
    "loop.ema": {"set": {"loop.ema": "trained"}},
    "load.threads": {"format": "nf4", "set": {"load.threads": 2}},
    "sdpa_efficient": {"attention": "sdpa_efficient"},
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_one_process_does_not_run_is_refused(says: str) -> None:
    with pytest.raises((Unsupported, RequestError), match=says):
        run(tiny(**REFUSED[says]))


def test_a_gpu_is_not_pretended() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(OutsideError, match="torch sees no GPU"):
        measure(tiny(), Settings(device="cuda"), identity="a", campaign="c")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("CUDA error: out of memory")]
)
def test_running_out_of_memory_is_known_by_any_name(error: Exception) -> None:
    wrapped = RequestError("something")
    wrapped.__cause__ = error
    assert lacks_memory(error)
    assert lacks_memory(wrapped)
    assert not lacks_memory(RuntimeError("expected a tensor"))


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.json"
    path.write_text(tiny(method="lora").model_dump_json(by_alias=True, exclude_defaults=True))
    return path


def test_the_command_puts_its_record_into_a_file(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "mine.jsonl"
    command = ["profile", "--job", str(job_file), "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    assert "A run on none (CPU)" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (record,) = load(out.parent)
    assert (printed["schema"], printed["id"]) == ("peftplan.record/1", record.id)


def test_the_module_does_the_same_without_typer(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.jsonl"
    assert cuda.main([str(job_file), "--device", "cpu", "--timed", "1", "--out", str(out)]) == 0
    assert Record.model_validate_json(capsys.readouterr().out) == next(iter(load(tmp_path)))
    job_file.write_text("[1]")
    assert cuda.main([str(job_file)]) == 2
    assert "expected a mapping" in capsys.readouterr().err
    assert cuda.main([]) == 2


# -- a GPU's part, with stand-ins ------------------------------------------------------------------------------------


def test_the_gauge_reads_each_phases_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    held = CachingAllocator()
    counters = {
        "max_memory_allocated": lambda: held.peak_allocated_bytes,
        "max_memory_reserved": lambda: held.peak_reserved_bytes,
        "reset_peak_memory_stats": held.reset_peaks,
        "memory_allocated": lambda: held.allocated_bytes,
    }
    for name, counter in counters.items():
        monkeypatch.setattr(torch.cuda, name, counter)
    gauge = CudaGauge()
    with gauge.watching():
        gauge.begin("load")
        held.alloc(1, 30 * MIB)
        gauge.begin("forward")
        held.alloc(2, 50 * MIB)
        held.free(2)
        gauge.begin("backward")
        held.alloc(3, 10 * MIB)
        gauge.begin("forward")
    assert gauge.peaks == {"load": 30 * MIB, "forward": 80 * MIB, "backward": 40 * MIB}
    assert gauge.reserved == {"load": 30 * MIB, "forward": 80 * MIB, "backward": 80 * MIB}
    assert gauge.began["backward"] == 30 * MIB


def test_the_kernel_without_groups_gets_repeated_heads() -> None:
    from transformers.integrations import sdpa_attention

    keys = torch.zeros(1, 2, 4, 8)
    assert sdpa_attention.use_gqa_in_sdpa(None, keys, keys)
    with repeated_heads():
        assert not sdpa_attention.use_gqa_in_sdpa(None, keys, keys)
    assert sdpa_attention.use_gqa_in_sdpa(None, keys, keys)


def test_nvidia_smi_is_read_where_it_says_something() -> None:
    card = gpu.parse("NVIDIA H100 80GB HBM3, 580.159.04, 81559, 523, 1980, 2619, 412.35, 41")
    assert card is not None
    assert (card.name, card.total_bytes, card.used_bytes) == ("NVIDIA H100 80GB HBM3", 81559 * MIB, 523 * MIB)
    assert (card.sm_clock_mhz, card.power_watts, card.temperature_celsius) == (1980, 412.35, 41)
    shy = gpu.parse("NVIDIA GH200, 1, 2, [N/A], [Not Supported], [N/A], [N/A], [N/A]")
    assert shy is not None
    assert (shy.used_bytes, shy.sm_clock_mhz, shy.power_watts) == (None, None, None)
    assert gpu.parse("No devices were found") is None


def test_without_nvidia_smi_there_is_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu.read() is None


def test_nvidia_smi_is_asked_while_the_card_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "NVIDIA L4, 1, 2, 3, 4, 5, 6, 7"
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nsleep 0.2\necho '{said}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    worked = SimpleNamespace(times=0)

    def work() -> None:
        worked.times += 1

    assert gpu.read(work) == gpu.parse(said)
    assert worked.times > 0


# -- the allocator's history -----------------------------------------------------------------------------------------


def test_a_history_is_replayed_through_our_allocator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        ("segment_alloc", 0, 20 * MIB), ("alloc", 0, 6 * MIB), ("alloc", 6 * MIB, 6 * MIB),
        ("free_requested", 0, 6 * MIB), ("free_completed", 0, 6 * MIB), ("alloc", 0, 5 * MIB),
        ("segment_alloc", 100 * MIB, 40 * MIB), ("alloc", 100 * MIB, 40 * MIB), ("snapshot", 0, 0),
    ]  # fmt: skip
    path = tmp_path / "history.json.gz"
    history.write(path, rows)
    found = history.replayed(history.read(path))
    assert (found.requests, found.reserved_bytes, found.replayed_bytes) == (4, 60 * MIB, 60 * MIB)
    assert history.main([str(path)]) == 0
    assert "(+0.00%)" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadFile, match="not a history"):
        history.read(path)
