"""The packages a written folder installs: the trainer's pins and what the job's own choices need."""

from __future__ import annotations

from peftplan import formats, methods, optimizers
from peftplan.job import Job
from peftplan.trainers import Trainer

BITSANDBYTES = "bitsandbytes==0.50.2"
"""The version whose storage and optimizer states peftplan mirrors (formats/_bnb4.py, optimizers/adamw_8bit.py)."""
FLASH_ATTENTION = "flash-attn>=2.6"
"""Built against the machine's own torch and CUDA, hence no pin."""


def requirements(trainer: Trainer, job: Job) -> str:
    """A requirements.txt: one requirement a line."""
    lines = [*trainer.requirements]
    if _needs_bitsandbytes(job) and not any(line.startswith("bitsandbytes") for line in lines):
        lines.append(BITSANDBYTES)
    if (job.attention or "").startswith("flash_attention"):
        lines.append(FLASH_ATTENTION)
    lines += methods.packages_of(job.method)
    return "\n".join(lines) + "\n"


def _needs_bitsandbytes(job: Job) -> bool:
    packed = job.format is not None and formats.get(job.format)().packed
    return packed or (job.optimizer is not None and optimizers.resolve_name(job.optimizer)[0] == "adamw_8bit")
