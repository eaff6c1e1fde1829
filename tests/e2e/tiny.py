"""Tiny random models, a tokenizer and data to train on: `python tests/e2e/tiny.py FOLDER`.

Needs transformers of any version, and nothing of this repository: a tokenizer saved by transformers 5 does not load
in 4.57, so that each environment writes its own.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "model", "memory", "gradient",
    "adapter", "layer", "loss", "step", "token",
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ message['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, dict[str, Any]] = {
    "tiny-llama": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4},
    "tiny-qwen2": {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4},
    "wide-llama": {"model_type": "llama", "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8},
}
"""bitsandbytes keeps the states of weights below 4,096 elements in fp32: 8-bit optimizers show on wide-llama only."""
ROWS = 64


def write(folder: Path) -> None:
    """folder/{tiny-llama,tiny-qwen2,wide-llama}, and data in the four shapes that trainers read."""
    rows = _rows()
    _write_data(folder, rows)
    tokenizer = _tokenizer([f"{asked} {answered}" for asked, answered in rows])
    for name, size in SIZES.items():
        _write_model(folder / name, size)
        tokenizer.save_pretrained(str(folder / name))


def _rows() -> list[tuple[str, str]]:
    dice = random.Random(0)
    return [(" ".join(dice.choices(WORDS, k=12)), " ".join(dice.choices(WORDS, k=16))) for _ in range(ROWS)]


def _write_data(folder: Path, rows: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    alpaca = [{"instruction": asked, "input": "", "output": answered} for asked, answered in rows]
    chats = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
        for asked, answered in rows
    ]
    _write_lines(folder / "messages.jsonl", chats)
    _write_lines(folder / "alpaca.jsonl", alpaca)
    _write_lines(folder / "text.jsonl", [{"text": f"{asked} {answered}"} for asked, answered in rows])
    (folder / "alpaca.json").write_text(json.dumps(alpaca), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [*texts, "system user assistant\n"],
        trainers.BpeTrainer(vocab_size=512, special_tokens=marks, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=marks[0], eos_token=marks[2], pad_token=marks[0], unk_token=marks[3]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = 512
    return tokenizer


def _write_model(folder: Path, size: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **size, vocab_size=512, num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(str(folder))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
