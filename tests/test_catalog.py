"""The model catalog: rows are sound, a name means one model, configs count what they should."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import pytest
from pydantic import TypeAdapter

import peftplan.arch.catalog as catalog
from peftplan.arch import load_arch, parameter_count
from peftplan.arch.catalog import ModelEntry, find_model, models, spelling
from peftplan.arch.families import families
from peftplan.errors import UnknownName

LINES = Path(catalog.__file__).with_name("models.jsonl").read_text(encoding="utf-8").splitlines()
READABLE = [entry for entry in models() if entry.model_type in families()]


def test_every_row_has_the_schema() -> None:
    adapter, names = TypeAdapter(ModelEntry), {field.name for field in dataclasses.fields(ModelEntry)}
    for line in LINES:
        adapter.validate_json(line, strict=True)
        assert set(json.loads(line)) == names


def test_rows_are_complete() -> None:
    assert len(models()) >= 476
    for entry in models():
        assert entry.id.count("/") == 1
        assert entry.params > 0
        assert entry.source
        assert entry.license
        assert entry.config["model_type"]
        assert not {"dtype", "torch_dtype", "auto_map"} & set(entry.config)


def test_a_name_means_one_model() -> None:
    meanings: dict[str, set[str]] = defaultdict(set)
    for entry in models():
        for name in entry.names:
            meanings[spelling(name)].add(entry.id)
    assert {name: ids for name, ids in meanings.items() if len(ids) > 1} == {}


@pytest.mark.parametrize("entry", READABLE, ids=lambda entry: entry.id)
def test_counts_are_those_of_the_model_class(entry: ModelEntry) -> None:
    arch = load_arch(entry.id)
    assert parameter_count(arch) == entry.params
    assert arch.dtype.label == entry.dtype
    assert arch.name == entry.id


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("llama-7b", "huggyllama/llama-7b"),
        ("LLAMA_7B", "huggyllama/llama-7b"),
        ("llama 7b", "huggyllama/llama-7b"),
        ("llama2-7b", "meta-llama/Llama-2-7b-hf"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("lmsys/vicuna-7b-v1.5", "meta-llama/Llama-2-7b-hf"),
        ("llama3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("llama3_1_8b", "meta-llama/Llama-3.1-8B"),
        ("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("qwen3-8b", "Qwen/Qwen3-8B"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("mistral-7b-instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
        ("zephyr-7b", "mistralai/Mistral-7B-v0.1"),
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
        ("TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
        ("smollm3", "HuggingFaceTB/SmolLM3-3B"),
        ("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("phi3-mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("phi-2", "microsoft/phi-2"),
        ("gemma-2b", "google/gemma-2b"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("opt-1.3b", "facebook/opt-1.3b"),
        ("opt-13b", "facebook/opt-13b"),
        ("gpt2", "openai-community/gpt2"),
    ],
)
def test_names_people_type(name: str, model: str) -> None:
    assert find_model(name).id == model


@pytest.mark.parametrize("name", ["gemma-22b", "opt-1b3", "llama-318b", "llama", "", "7b", "mistral-7b-instruct"])
def test_a_doubtful_name_is_not_guessed(name: str) -> None:
    with pytest.raises(UnknownName) as caught:
        find_model(name)
    assert "list models" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_suggests_different_models() -> None:
    with pytest.raises(UnknownName, match="did you mean llama3-8b, llama31-8b, llama-7b, llama2-7b") as caught:
        find_model("llama-8b")
    assert str(caught.value).startswith("unknown model 'llama-8b'")


def test_what_is_not_confirmed_is_said() -> None:
    for entry in models():
        assert (entry.caveat is None) == (entry.verification == "exact")
    recalled = load_arch("granite-8b-code")
    assert "recalled, not read from a file; no published parameter count confirms it" in recalled.notes[0]
    assert load_arch("llama-7b").notes == ()


def test_a_checkpoint_of_the_same_sizes_is_said_to_stand_in() -> None:
    note = "{} has the sizes of meta-llama/Llama-2-7b-hf, which is taken with its dtype, float16"
    assert load_arch("lmsys/vicuna-7b-v1.5").notes == (note.format("lmsys/vicuna-7b-v1.5"),)
    assert load_arch("vicuna-7b").notes == (note.format("vicuna-7b"),)
    assert load_arch("Llama_2-7B").notes == load_arch("meta-llama/Llama-2-7b-hf").notes == ()


def test_models_not_modelled_yet_stay_listed() -> None:
    unread = {entry.model_type for entry in models()} - set(families())
    assert {"gpt2", "gemma2", "t5"} <= unread
