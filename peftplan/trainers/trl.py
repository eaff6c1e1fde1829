"""TRL: `trl sft --config FILE`, a flat YAML of SFTConfig, ModelConfig and ScriptArguments.

Reads: the YAML. Writes: the YAML and the command.
Not expressed: methods other than full and LoRA with rsLoRA and DoRA.
"""

from __future__ import annotations

from typing import final

import yaml

from peftplan.job import Job
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import Config, always, same, words


@final
class Trl(Trainer):
    name = "trl"
    title = "TRL"
    homepage = "https://huggingface.co/docs/trl"
    requirements = ("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0")
    signature = frozenset({"model_name_or_path", "use_peft", "lora_target_modules", "max_length"})
    dataset_keys = ("dataset_name",)
    harmless = frozenset({"dataset*", "output_dir", "logging_*", "save_*", "report_to", "seed", "learning_rate"})
    rules = (
        same("model_name_or_path", "model"),
        words("use_peft", "method", {True: "lora", False: "full"}, default="full"),
        same("lora_r", "rank"),
        same("lora_target_modules", "target_modules"),
        same("per_device_train_batch_size", "micro_batch", default=8),
        same("gradient_accumulation_steps", "grad_accum", default=1),
        same("max_length", "seq_len", default=1024),
        always("loop.outputs_until", "loss"),
    )

    def run_keys(self, run: Run) -> Config:
        return {"dataset_name": run.dataset, "output_dir": run.output_dir, "seed": run.seed}

    def folder(self, job: Job, run: Run) -> Folder:
        text = yaml.safe_dump(self.config(job, run), sort_keys=False)
        return Folder(files={"sft.yaml": text}, command="trl sft --config sft.yaml")


TRAINER = Trl
