"""The trace instrument against real tensors, PEFT's counts, torch's FLOP counter and the CPU's allocator."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import RequestError, UnknownName, Unsupported  # noqa: E402
from peftplan.instruments import build, recompute  # noqa: E402
from peftplan.instruments import trace as instrument  # noqa: E402
from peftplan.instruments.answer import Trace, levels  # noqa: E402
from peftplan.instruments.flops import FLOP_FORMULAS  # noqa: E402
from peftplan.instruments.hooks import quiet  # noqa: E402
from peftplan.instruments.trace import trace  # noqa: E402
from peftplan.job import Job, make_job  # noqa: E402

pytestmark = pytest.mark.trace

TINY: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "phi3": {"eos_token_id": 0},
    "smollm3": {"bos_token_id": 0, "eos_token_id": 0},
}
COMPARED = (
    "parameters",
    "static",
    "saved_for_backward_bytes",
    "peak_bytes",
    "phases",
    "flops",
    "events",
    "notes",
)


def tiny(family: str = "llama", **fields: Any) -> Job:
    config = {**TINY, **FAMILIES[family], "model_type": family}
    return make_job(**{"model": "tiny", "config": config, "micro_batch": 3, "seq_len": 17, **fields})


@functools.cache
def _traced(job_json: str, mode: Any) -> Trace:
    return trace(make_job(**json.loads(job_json)), mode=mode)


def traced(job: Job, mode: str = "fake") -> Trace:
    return _traced(job.model_dump_json(by_alias=True), mode)


QLORA_AMP = {"method": "qlora", "precision": "bf16-mixed", "dtype": "bf16"}
CASES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "full fp32 without cache": {"method": "full", "precision": "fp32", "set": {"model.use_cache": False}},
    "full padded eager": {"method": "full", "batching": "padded", "attention": "eager"},
    "full recompute": {"method": "full", "recompute": "full"},
    "full amp": {"method": "full", "precision": "bf16-mixed"},
    "full foreach": {"method": "full", "optimizer": "adamw_torch_foreach"},
    "full fused": {"method": "full", "set": {"optimizer.impl": "fused"}},
    "freeze": {"method": "freeze", "set": {"method.layers": 1, "method.train": ["lm_head"]}},
    "lora": {"method": "lora"},
    "lora padded": {"method": "lora", "batching": "padded"},
    "lora math": {"method": "lora", "attention": "sdpa_math"},
    "lora padded recompute": {"method": "lora", "batching": "padded", "recompute": "full"},
    "lora reentrant": {"method": "lora", "recompute": "full", "set": {"recompute.use_reentrant": True}},
    "lora bf16 adapter": {"method": "lora", "adapter_dtype": "bf16", "target_modules": "all-linear"},
    "lora amp dropout": {
        "method": "lora",
        "precision": "bf16-mixed",
        "dtype": "bf16",
        "set": {"method.lora_dropout": 0.1, "method.modules_to_save": ["lm_head"]},
    },
    "lora accumulates": {"method": "lora", "grad_accum": 4},
    "lora outputs until next": {"method": "lora", "set": {"loop.outputs_until": "next"}},
    "dora": {"method": "lora", "set": {"method.use_dora": True}},
    "pissa": {"method": "lora", "set": {"method.init_lora_weights": "pissa"}},
    "nf4": {"method": "lora", "format": "nf4"},
    "fp4 unprepared": {"method": "lora", "format": "fp4", "set": {"format.prepare": False}},
    "int8": {"method": "lora", "format": "int8"},
    "qlora": {**QLORA_AMP, "target_modules": "all-linear"},
    "qlora dora": {"method": "qlora", "set": {"method.use_dora": True}},
    "qlora recompute": {**QLORA_AMP, "batching": "padded", "recompute": "full"},
    "ia3": {"method": "ia3"},
    "vera": {"method": "vera"},
    "prompt tuning": {"method": "prompt_tuning", "set": {"method.num_virtual_tokens": 5}},
    "prefix tuning": {"method": "prefix_tuning", "set": {"method.num_virtual_tokens": 5}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_fake_step_equals_the_real_one(case: str) -> None:
    fake, real = (traced(tiny(**CASES[case]), mode) for mode in ("fake", "real"))
    for name in COMPARED:
        assert getattr(fake, name) == getattr(real, name), name


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_a_fake_step_equals_the_real_one_in_other_families(family: str) -> None:
    job = tiny(family, method="lora", batching="padded", target_modules=("o_proj", "down_proj"))
    fake, real = (traced(job, mode) for mode in ("fake", "real"))
    for name in COMPARED:
        assert getattr(fake, name) == getattr(real, name), name


def test_two_traces_are_equal() -> None:
    job = tiny(**CASES["lora amp dropout"])
    assert traced(job).to_json() == trace(job).to_json()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- against what torch and PEFT say themselves ----------------------------------------------------


class Bare:
    """The same step of the same model, with nobody watching."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.choices = build.decide(job)
        with quiet():
            self.model: Any = build.apply_method(build.base_model(self.choices, "real"), self.choices)
            if self.choices.recompute:
                recompute.checkpoint_layers(self.model, job)
        self.model.train()
        trained = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def forward(self) -> tuple[Any, Any]:
        """The batch and the outputs."""
        ids = torch.ones((self.job.micro_batch, self.choices.seq_len), dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.choices.padded:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][-1, -1:] = 0
        dtype = self.choices.autocast
        with quiet(), contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            return batch, self.model(**batch)

    def step(self) -> None:
        kept = self.forward()
        kept[1].loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


WIDER = {
    **TINY,
    "hidden_size": 96,
    "intermediate_size": 272,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "full"},
        {"method": "full", "recompute": "full"},
        {"method": "lora", "target_modules": "all-linear", "batching": "padded"},
        {"method": "lora", "recompute": "full"},
        {"method": "lora", "attention": "eager", "format": "nf4"},
        {"method": "lora", "format": "int8"},
    ],
    ids=str,
)
def test_the_peak_is_what_the_cpu_allocator_reports_unwatched(fields: dict[str, Any]) -> None:
    job = make_job(model="wider", config=WIDER, micro_batch=4, seq_len=96, precision="fp32", **fields)
    bare = Bare(job)
    bare.step()
    allocated, events = _allocator_peak(bare), trace(job)
    # Python scalars in operators, and the random state of each checkpoint, are on the host on any device.
    assert allocated == events.peak_bytes - events.static_bytes


def _allocator_peak(bare: Bare) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        bare.step()
    found = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        if abs(event.nbytes()) not in (8, 5056):
            level += event.nbytes()
        peak = max(peak, level)
    return peak


@pytest.mark.parametrize("case", ["full", "lora", "full recompute", "qlora recompute", "int8"])
def test_saved_bytes_hold_what_autograd_packs(case: str) -> None:
    job = tiny(**CASES[case])
    bare = Bare(job)
    bare.step()
    kept: dict[int, Any] = {}
    lasting = {p.untyped_storage().data_ptr() for p in (*bare.model.parameters(), *bare.model.buffers())}

    def pack(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, outputs = bare.forward()
    packed = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in lasting)
    answer = traced(job)
    assert packed == sum(entry.bytes for entry in answer.saved if entry.via == "autograd")
    assert answer.saved_for_backward_bytes == sum(entry.bytes for entry in answer.saved)
    assert outputs.loss.item() > 0


@pytest.mark.parametrize("case", ["full", "lora", "lora padded recompute", "full padded eager", "lora amp dropout"])
def test_flops_are_those_of_torchs_counter(case: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    bare = Bare(tiny(**CASES[case]))
    own = {op: vars(formula)["__wrapped__"] for op, formula in FLOP_FORMULAS.items() if "for_cpu" in str(op)}
    with FlopCounterMode(display=False, custom_mapping=own) as forward:
        _, outputs = bare.forward()
    with FlopCounterMode(display=False, custom_mapping=own) as backward:
        outputs.loss.backward()
    flops = traced(tiny(**CASES[case])).flops
    assert flops["forward"] == forward.get_total_flops()
    assert flops["backward"] + flops["recompute"] == backward.get_total_flops()
    assert flops["total"] == sum(flops[name] for name in ("forward", "backward", "recompute", "optimizer"))


@pytest.mark.parametrize("case", ["full", "lora", "qlora", "int8", "ia3", "prompt tuning"])
def test_counts_are_pefts_own(case: str) -> None:
    from peft import PeftModel

    job = tiny(**CASES[case])
    trainable, total = PeftModel.get_nb_trainable_parameters(Bare(job).model)
    parameters = traced(job).parameters
    assert (parameters["trainable"], parameters["total"]) == (trainable, total)


# -- within itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_a_trace_agree(case: str) -> None:
    answer = traced(tiny(**CASES[case]))
    assert sum(storage.bytes for storage in answer.at_peak) == answer.peak_bytes
    assert max(answer.phases.values()) == answer.phases[answer.peak_phase] == answer.peak_bytes
    assert answer.static_bytes == sum(answer.static.values())
    assert answer.static_bytes == sum(event.bytes for event in answer.events if event.phase == "static")
    heights = list(levels(answer.events))
    assert max(heights) == answer.peak_bytes
    assert heights[-1] == answer.static_bytes - answer.static["gradient"]


def test_adam_keeps_two_states_of_each_weights_dtype() -> None:
    answer = traced(tiny(method="full"))
    assert answer.static["parameter"] == 2 * answer.parameters["total"]
    assert answer.static["optimizer"] == 2 * answer.static["parameter"]
    assert answer.static["gradient"] == 0


def test_kept_gradients_are_static() -> None:
    answer = traced(tiny(**CASES["lora accumulates"]))
    assert answer.static["gradient"] == 4 * answer.parameters["trainable"]


def test_tied_weights_count_once() -> None:
    tied, untied = (
        traced(tiny("qwen2", method="full", set={"model.tie_word_embeddings": flag})) for flag in (True, False)
    )
    assert untied.parameters["stored_bytes"] - tied.parameters["stored_bytes"] == 2 * 97 * 48


def test_packed_weights_are_as_large_as_bitsandbytes_says() -> None:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(88, 48), compress_statistics=False, quant_type="nf4")
    entries = [e for e in traced(tiny(**CASES["nf4"])).events if e.phase == "static" and ".0.mlp.up_proj" in e.module]
    assert [e.bytes for e in entries] == [packed.nbytes, state.absmax.nbytes, state.code.nbytes]


def test_recomputation_stops_before_the_layers_last_product() -> None:
    flops = traced(tiny(**CASES["full recompute"])).flops
    head, down = (2 * 3 * 17 * 48 * width for width in (97, 88))
    assert flops["recompute"] == flops["forward"] - head - 3 * down


def test_what_is_saved_names_module_line_and_operator() -> None:
    saved = traced(tiny(method="lora")).saved
    entry = next(e for e in saved if e.module.endswith("layers.1.self_attn.q_proj.lora_A.default"))
    assert (entry.op, entry.dtype, entry.shape) == ("MmBackward0", "float32", (51, 48))
    assert entry.source.startswith("peft/tuners/lora/layer.py:")


def test_json_holds_everything() -> None:
    answer = traced(tiny(method="lora"))
    loaded = json.loads(answer.to_json())
    assert loaded["events"][0]["action"] == "alloc"
    assert loaded["versions"]["torch"] == torch.__version__
    assert loaded["saved_for_backward_bytes"] == answer.saved_for_backward_bytes


# -- bad requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"method": "lara"}, UnknownName, "lora"),
        ({"method": "lora", "set": {"method.lora_alfa": 3}}, RequestError, "lora_alpha"),
        ({"method": "lora", "target_modules": "nothing_like_it"}, RequestError, "nothing_like_it"),
        ({"method": "lora", "rank": 0}, RequestError, "rank"),
        ({"config": None}, RequestError, "config.json"),
        ({"config": {"hidden_size": 8}}, RequestError, "model_type"),
        ({"config": {"model_type": "lama"}}, Unsupported, "lama"),
        ({"batching": "packed"}, Unsupported, "packed"),
        ({"attention": "flash_attention_2"}, Unsupported, "sdpa"),
        ({"optimizer": "lion"}, Unsupported, "adamw"),
        ({"format": "nf4", "set": {"format.blocksize": 48}}, RequestError, "blocksize"),
        ({"method": "freeze", "set": {"method.layers": 4}}, RequestError, "3 layers"),
        ({"method": "freeze", "set": {"method.layers": 0}}, RequestError, "trains nothing"),
    ],
    ids=str,
)
def test_a_bad_request_is_one_line(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        trace(tiny(**fields))
    assert "\n" not in str(caught.value)


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.json"
    path.write_text(tiny(method="lora").model_dump_json(by_alias=True))
    return path


def test_the_module_prints_a_trace(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert instrument.main([str(job_file)]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "fake"


def test_the_module_refuses_a_bad_file(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job_file.write_text("[1]")
    assert instrument.main([str(job_file)]) == 2
    assert "holds no JSON object" in capsys.readouterr().err
