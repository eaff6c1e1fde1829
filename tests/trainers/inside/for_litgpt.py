"""Run inside LitGPT's environment: `FOLDER` writes a tiny model, `count FILE` counts a checkpoint's numbers."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "memory", "holds", "gradients"]


def tiny(folder: Path) -> None:
    """A Llama of 512 words in LitGPT's names, its tokenizer, and rows to learn."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import save_config
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True)
    dice = random.Random(0)
    rows = [(" ".join(dice.choices(WORDS, k=12)), " ".join(dice.choices(WORDS, k=16))) for _ in range(64)]
    data = [{"instruction": asked, "input": "", "output": answered} for asked, answered in rows]
    (folder / "alpaca.json").write_text(json.dumps(data))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text for row in rows for text in row],
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet),
    )
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    config = Config(
        name="tiny", block_size=512, vocab_size=512, padded_vocab_size=512, n_layer=2, n_head=4, n_query_groups=2,
        n_embd=64, intermediate_size=176, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
    save_config(config, folder)


def count(path: Path) -> int:
    import torch

    state = torch.load(path, weights_only=True, mmap=True)
    return sum(tensor.numel() for tensor in state.get("model", state).values())


if __name__ == "__main__":
    if sys.argv[1] == "count":
        print(count(Path(sys.argv[2])))
    else:
        tiny(Path(sys.argv[1]))
