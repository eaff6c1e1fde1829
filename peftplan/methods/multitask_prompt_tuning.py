"""Multitask prompt tuning: one prompt times a low-rank matrix of the task's (Wang 2023, arXiv:2303.02861).

Trains: num_virtual_tokens x hidden, and num_tasks x num_ranks x (num_virtual_tokens + hidden).
Keeps for backward: the prompt and the task's matrix in fp32 for every sequence; every activation of the model is that
many positions longer, logits included.
Not modelled: packed batches, a token_dim other than the model's.
Mirrors peft/tuners/multitask_prompt_tuning/model.py MultitaskPromptEmbedding and peft/peft_model.py get_prompt, peft
0.21.2. The batch brings a task's number for every sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, INPUT, Grad, Tensor
from peftplan.methods import _prompts, _virtual
from peftplan.methods._virtual import Prompt, VirtualTokens
from peftplan.units import DType

HARMLESS = _virtual.HARMLESS | _virtual.TEXT | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"}


@final
@dataclass(frozen=True)
class MultitaskPromptTuning(VirtualTokens):
    """PEFT's MultitaskPromptTuningConfig, the knobs that change memory."""

    num_tasks: int = 1
    num_ranks: int = 1

    def check(self) -> None:
        if self.num_tasks < 1 or self.num_ranks < 1:
            raise RequestError(f"method.num_tasks={self.num_tasks}, num_ranks={self.num_ranks}: use at least 1 of each")

    def inputs(self, size: int) -> tuple[Tensor, ...]:
        return (Tensor("@task_ids", (size,), DType.int64, INPUT),)

    def encode(self, b: Builder, ids: Tensor, prompt: Prompt) -> Tensor:
        """MultitaskPromptEmbedding.forward; mul_ clones what it writes over, for its backward."""
        (tasks,) = self.inputs(prompt.size)
        prompts = _prompts.lookup(b, ids, prompt.tokens, prompt.hidden, copies=prompt.size)
        cols = self._chosen(b, "cols", tasks, (prompt.tokens, self.num_ranks))
        rows = self._chosen(b, "rows", tasks, (self.num_ranks, prompt.hidden))
        shared = b.matmul(cols, rows, *prompts.shape, inner=self.num_ranks, label="task_prompts")
        before = b.plain("prompts_before", *prompts.shape, dtype=prompts.dtype, ins=(prompts,))
        full = prompts.logical_bytes
        out = prompts._replace(base=prompts.storage)
        grads = (Grad(prompts, full), Grad(shared, full))
        out = b.formula("task_prompt", out, prompts, shared, keeps=(before, shared), grads=grads)
        b.hold(cols, rows, shared)
        return out

    def _chosen(self, b: Builder, what: str, tasks: Tensor, shape: tuple[int, int]) -> Tensor:
        """torch.index_select of a task's matrix: its gradient is added up into zeros, out of place."""
        weight = Tensor(f"@prompt_encoder.prefix_task_{what}", (self.num_tasks, *shape), DType.float32, ADAPTER, True)
        out = Tensor("", (tasks.shape[0], *shape), weight.dtype)
        full = weight.logical_bytes
        return b.formula(f"task_{what}", out, tasks, weight, keeps=(tasks,), grads=(Grad(weight, full, full),))


METHOD = MultitaskPromptTuning
EXAMPLES = (MultitaskPromptTuning(num_virtual_tokens=20), MultitaskPromptTuning(num_virtual_tokens=5, num_tasks=3))
UNVERIFIED: dict[str, str] = {}
