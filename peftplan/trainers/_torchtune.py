"""Models that torchtune builds: which builder, tokenizer and checkpoint files stand for a Hub model.

Read from torchtune 0.6.1, torchtune/models/*/_model_builders.py and recipes/configs, 2026-11-21. gemma2, phi3, phi4 and
the vision models are left out: peftplan does not model them, or its model has other projections than torchtune's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftplan.arch import catalog


@dataclass(frozen=True)
class Built:
    """A model that torchtune has a builder for."""

    builder: str
    """package.function, without the `lora_` or `qlora_` of its adapted forms."""
    hub: str
    """The checkpoint of torchtune's own recipes."""
    files: int
    """Into how many safetensors files it is split."""
    model_type: str
    """How torchtune's checkpointer renames its weights."""


_LLAMA3, _LLAMA2, _QWEN2 = "LLAMA3", "LLAMA2", "QWEN2"
MODELS = (
    Built("llama2.llama2_7b", "meta-llama/Llama-2-7b-hf", 2, _LLAMA2),
    Built("llama2.llama2_13b", "meta-llama/Llama-2-13b-hf", 3, _LLAMA2),
    Built("llama2.llama2_70b", "meta-llama/Llama-2-70b-hf", 15, _LLAMA2),
    Built("code_llama2.code_llama2_7b", "codellama/CodeLlama-7b-hf", 2, _LLAMA2),
    Built("llama3.llama3_8b", "meta-llama/Meta-Llama-3-8B-Instruct", 4, _LLAMA3),
    Built("llama3.llama3_70b", "meta-llama/Meta-Llama-3-70B-Instruct", 30, _LLAMA3),
    Built("llama3_1.llama3_1_8b", "meta-llama/Meta-Llama-3.1-8B-Instruct", 4, _LLAMA3),
    Built("llama3_1.llama3_1_70b", "meta-llama/Meta-Llama-3.1-70B-Instruct", 30, _LLAMA3),
    Built("llama3_1.llama3_1_405b", "meta-llama/Meta-Llama-3.1-405B-Instruct", 191, _LLAMA3),
    Built("llama3_2.llama3_2_1b", "meta-llama/Llama-3.2-1B-Instruct", 1, "LLAMA3_2"),
    Built("llama3_2.llama3_2_3b", "meta-llama/Llama-3.2-3B-Instruct", 2, "LLAMA3_2"),
    Built("llama3_3.llama3_3_70b", "meta-llama/Llama-3.3-70B-Instruct", 30, _LLAMA3),
    Built("mistral.mistral_7b", "mistralai/Mistral-7B-v0.1", 2, "MISTRAL"),
    Built("gemma.gemma_2b", "google/gemma-2b", 2, "GEMMA"),
    Built("gemma.gemma_7b", "google/gemma-7b", 4, "GEMMA"),
    Built("qwen2.qwen2_0_5b", "Qwen/Qwen2-0.5B-Instruct", 1, _QWEN2),
    Built("qwen2.qwen2_1_5b", "Qwen/Qwen2-1.5B-Instruct", 1, _QWEN2),
    Built("qwen2.qwen2_7b", "Qwen/Qwen2-7B-Instruct", 4, _QWEN2),
    Built("qwen2_5.qwen2_5_0_5b", "Qwen/Qwen2.5-0.5B-Instruct", 1, _QWEN2),
    Built("qwen2_5.qwen2_5_1_5b_instruct", "Qwen/Qwen2.5-1.5B-Instruct", 1, _QWEN2),
    Built("qwen2_5.qwen2_5_3b", "Qwen/Qwen2.5-3B-Instruct", 2, _QWEN2),
    Built("qwen2_5.qwen2_5_7b_instruct", "Qwen/Qwen2.5-7B-Instruct", 4, _QWEN2),
    Built("qwen2_5.qwen2_5_14b_instruct", "Qwen/Qwen2.5-14B-Instruct", 8, _QWEN2),
    Built("qwen2_5.qwen2_5_32b_instruct", "Qwen/Qwen2.5-32B-Instruct", 17, _QWEN2),
    Built("qwen2_5.qwen2_5_72b_instruct", "Qwen/Qwen2.5-72B-Instruct", 37, _QWEN2),
)
WITHOUT_DORA = frozenset({"llama3_1.llama3_1_405b"})
_TOKENIZERS: dict[str, tuple[str, dict[str, str]]] = {
    "llama2": ("llama2.llama2_tokenizer", {"path": "tokenizer.model"}),
    "code_llama2": ("llama2.llama2_tokenizer", {"path": "tokenizer.model"}),
    "llama3": ("llama3.llama3_tokenizer", {"path": "original/tokenizer.model"}),
    "llama3_1": ("llama3.llama3_tokenizer", {"path": "original/tokenizer.model"}),
    "llama3_2": ("llama3.llama3_tokenizer", {"path": "original/tokenizer.model"}),
    "llama3_3": ("llama3.llama3_tokenizer", {"path": "original/tokenizer.model"}),
    "mistral": ("mistral.mistral_tokenizer", {"path": "tokenizer.model"}),
    "gemma": ("gemma.gemma_tokenizer", {"path": "tokenizer.model"}),
    "qwen2": ("qwen2.qwen2_tokenizer", {"path": "vocab.json", "merges_file": "merges.txt"}),
    "qwen2_5": ("qwen2_5.qwen2_5_tokenizer", {"path": "vocab.json", "merges_file": "merges.txt"}),
}
"""Package: (tokenizer, {argument: file of the checkpoint})."""


def by_builder(name: str) -> Built | None:
    """`llama3_1.llama3_1_8b`, or the spelling of its adapted forms or variants."""
    return next((made for made in MODELS if name in (made.builder, made.builder.replace("_instruct", "_base"))), None)


def by_model(model: str) -> Built | None:
    """The builder of a model under any name the catalog has for it, of a checkpoint with its sizes too."""
    entry = catalog.lookup(model)
    if entry is None:
        return None
    exact = (made for made in MODELS if made.hub.lower() == model.lower())
    same = (made for made in MODELS if catalog.lookup(made.hub) is entry)
    return next(exact, None) or next(same, None)


def folder_of(model: str) -> str:
    """Where `tune download` is told to put a checkpoint."""
    return f"checkpoints/{model}"


def model_in(folder: object, built: Built) -> str:
    """The model that a checkpoint's folder is named after; that of torchtune's recipes where it names none."""
    parts = str(folder).rstrip("/").removesuffix("/original").split("/")
    for name in ("/".join(parts[-2:]), parts[-1]):
        if by_model(name) in (built, *(made for made in MODELS if _same(made, built))):
            return name
    return built.hub


def _same(one: Built, other: Built) -> bool:
    return catalog.lookup(one.hub) is catalog.lookup(other.hub)


def checkpoint(model: str, built: Built) -> dict[str, Any]:
    """The flat keys that say where weights and tokenizer are."""
    folder = folder_of(model)
    tokenizer, files = _TOKENIZERS[built.builder.partition(".")[0]]
    keys: dict[str, Any] = {"tokenizer._component_": f"torchtune.models.{tokenizer}"}
    keys |= {f"tokenizer.{argument}": f"{folder}/{file}" for argument, file in files.items()}
    keys |= {
        "checkpointer._component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpointer.checkpoint_dir": folder,
        "checkpointer.model_type": built.model_type,
        "checkpointer.recipe_checkpoint": None,
    }
    return keys | {"checkpointer.checkpoint_files": _files(built.files)}


def _files(count: int) -> Any:
    if count == 1:
        return ["model.safetensors"]
    return {"filename_format": "model-{}-of-{}.safetensors", "max_filename": f"{count:05d}"}
