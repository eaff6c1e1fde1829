"""How a job is spread over GPUs: `layout_of("fsdp,tp=2", gpus=8, nodes=1)`."""

from peftplan.layouts.base import DATA_PARALLEL, SCHEDULES, SINGLE, Layout, check, unmodelled
from peftplan.layouts.words import Pipeline, knobs_of, layout_of, stated_world

__all__ = [
    "DATA_PARALLEL", "SCHEDULES", "SINGLE", "Layout", "Pipeline", "check", "knobs_of", "layout_of", "stated_world",
    "unmodelled",
]  # fmt: skip
