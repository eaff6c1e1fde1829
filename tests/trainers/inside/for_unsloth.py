"""Run inside Unsloth's environment: `CONFIG MODEL` takes steps of a local model as its command line would."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def train(path: Path, model_path: str) -> dict[str, object]:
    from unsloth import FastLanguageModel, is_bfloat16_supported  # isort: skip
    import torch
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth_cli.config import load_config

    said = load_config(path)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_path,
        max_seq_length=said.training.max_seq_length,
        load_in_4bit=said.training.load_in_4bit,
        dtype=torch.bfloat16,
    )
    asked = said.model_kwargs(use_lora=True, is_vision=False)
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    model = FastLanguageModel.get_peft_model(
        model,
        **{own: asked[key] for key, own in names.items()},
        target_modules=asked["target_modules"],
        use_gradient_checkpointing=asked["use_gradient_checkpointing"] == "true",
        use_rslora=asked["use_rslora"],
    )
    rows = load_dataset("json", data_files=said.data.local_dataset, split="train")
    rows = rows.map(lambda row: {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)})
    arguments = SFTConfig(
        output_dir="out",
        max_steps=said.training.max_steps,
        per_device_train_batch_size=said.training.batch_size,
        gradient_accumulation_steps=said.training.gradient_accumulation_steps,
        max_length=said.training.max_seq_length,
        dataset_text_field="text",
        optim="adamw_8bit",
        bf16=is_bfloat16_supported(),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows.select_columns(["text"]), processing_class=tokenizer
    )
    done = trainer.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "trainable": sum(p.numel() for p in trained),
        "dtypes": sorted({str(p.dtype) for p in trained}),
        "steps": done.global_step,
        "loss": done.training_loss,
    }


if __name__ == "__main__":
    print(json.dumps(train(Path(sys.argv[1]), sys.argv[2])))
