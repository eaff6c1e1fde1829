"""Multitask prompt tuning: one prompt times a low-rank matrix of the task's (Wang 2023, arXiv:2303.02861).

Trains: num_virtual_tokens x hidden, and num_tasks x num_ranks x (num_virtual_tokens + hidden).
Keeps for backward: the prompt and the task's matrix in fp32 for every sequence; every activation of the model is that
many positions longer, logits included.
Not modelled: packed batches, a token_dim other than the model's.
Mirrors peft/tuners/multitask_prompt_tuning/model.py MultitaskPromptEmbedding and peft/peft_model.py get_prompt, peft
0.21.2. The batch brings a task's number for every sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.blocks.decoder import Batch
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, INPUT, Grad, Graph, Tensor
from peftplan.methods import _prompts
from peftplan.methods.base import Family, Host, Method
from peftplan.units import DType

HARMLESS = _prompts.HARMLESS | {
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "num_attention_heads", "num_layers", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task",
}  # fmt: skip


@final
@dataclass(frozen=True)
class MultitaskPromptTuning(Method):
    """PEFT's MultitaskPromptTuningConfig, the knobs that change memory."""

    num_virtual_tokens: int | None = None
    num_tasks: int = 1
    num_ranks: int = 1
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    family: ClassVar[Family] = "soft prompt"

    def seen(self, batch: Batch) -> Batch:
        return _prompts.longer(batch, self.num_virtual_tokens)

    def apply(self, graph: Graph, host: Host) -> Graph:
        tokens, hidden = _prompts.checked_tokens(self.num_virtual_tokens), host.arch.hidden
        if self.num_tasks < 1 or self.num_ranks < 1:
            raise RequestError(f"method.num_tasks={self.num_tasks}, num_ranks={self.num_ranks}: use at least 1 of each")
        _prompts.check_shape(
            token_dim=(self.token_dim, hidden), num_transformer_submodules=(self.num_transformer_submodules, 1)
        )
        size = next(t.shape[0] for t in graph.inputs if t.name == "@labels")
        tasks = Tensor("@task_ids", (size,), DType.int64, INPUT)
        longer = _prompts.prepend(graph, host, tokens, lambda b, ids: self._encoded(b, ids, tasks, tokens, hidden))
        return replace(longer, inputs=(*longer.inputs, tasks))

    def _encoded(self, b: Builder, ids: Tensor, tasks: Tensor, tokens: int, hidden: int) -> Tensor:
        """MultitaskPromptEmbedding.forward; mul_ clones what it writes over, for its backward."""
        size = tasks.shape[0]
        prompts = _prompts.lookup(b, ids, tokens, hidden, copies=size)
        cols = self._chosen(b, "cols", tasks, (tokens, self.num_ranks))
        rows = self._chosen(b, "rows", tasks, (self.num_ranks, hidden))
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
