"""Run inside torchtune's environment: `validate FILES` with its own checks, `tiny FOLDER` writes a model to train."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "memory", "holds", "gradients"]


def validate(paths: list[str]) -> None:
    """Every component exists and takes the arguments it is given."""
    from omegaconf import OmegaConf
    from torchtune import config

    for path in paths:
        print(path, flush=True)
        config.validate(OmegaConf.load(path))


def tiny(folder: Path) -> None:
    """A Llama of 512 words in Hugging Face's names, its sentencepiece tokenizer, and conversations."""
    import sentencepiece
    import torch
    from safetensors.torch import save_file
    from torchtune.models.convert_weights import tune_to_hf
    from torchtune.models.llama2 import llama2

    folder.mkdir(parents=True)
    dice = random.Random(0)
    rows = [(" ".join(dice.choices(WORDS, k=12)), " ".join(dice.choices(WORDS, k=16))) for _ in range(64)]
    with (folder / "messages.jsonl").open("w") as file:
        for asked, answered in rows:
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "text.txt").write_text("\n".join(text for row in rows for text in row))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=512, hard_vocab_limit=False,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256}
    model = llama2(**sizes, intermediate_dim=704, max_seq_len=512)
    weights = tune_to_hf(model.state_dict(), num_heads=4, num_kv_heads=2, dim=256)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 512, **heads}))


if __name__ == "__main__":
    if sys.argv[1] == "validate":
        validate(sys.argv[2:])
    else:
        tiny(Path(sys.argv[2]))
