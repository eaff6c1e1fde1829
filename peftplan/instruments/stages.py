"""One rank of a pipeline, traced without its neighbours: torch.distributed.pipelining's own stages and schedules run
the real model's layers, in a process group that only pretends to send and receive.

What is received is memory that nobody wrote to, so values mean nothing; sizes and lifetimes are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining._utils import InferenceMode
from transformers.masking_utils import create_causal_mask

from peftplan.errors import RequestError
from peftplan.instruments import build, optim
from peftplan.instruments.engine import sole_owner
from peftplan.instruments.hooks import quiet
from peftplan.instruments.recorder import Recorder
from peftplan.instruments.trace import assembled
from peftplan.job import Job
from peftplan.layouts import Layout
from peftplan.layouts.stages import bounds
from peftplan.resolve import resolve

_SCHEDULES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
}


class Stage(torch.nn.Module):  # type: ignore[misc]
    """The layers [start, stop) of a Llama-shaped model, the embedding before the first, the head after the last.

    The forward is LlamaModel.forward's and LlamaForCausalLM.forward's part of it.
    """

    def __init__(self, causal: Any, start: int, stop: int) -> None:
        super().__init__()
        base = causal.model
        self.config = causal.config
        self.embed_tokens = base.embed_tokens if start == 0 else None
        self.rotary_emb = base.rotary_emb
        self.layers = torch.nn.ModuleList(base.layers[start:stop])
        last = stop == len(base.layers)
        self.norm = base.norm if last else None
        self.lm_head = causal.lm_head if last else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs_embeds = x if self.embed_tokens is None else self.embed_tokens(x)
        x = inputs_embeds
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        tables = self.rotary_emb(x, position_ids=positions)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=tables)
        if self.norm is not None and self.lm_head is not None:
            x = self.lm_head(self.norm(x))
        return x


def traced_peak(job: Job, rank: int) -> int:
    """The most bytes that one rank of a job's pipeline has allocated at once in a steady step, on real CPU tensors.

    Raises RequestError for models and methods that cannot be cut so.
    """
    layout = resolve(job).layout
    choices = build.decide(job)
    sole_owner()
    with quiet(), _group(layout.pp, rank):
        model: Any = assembled(choices, "real")
        causal = model.get_base_model() if choices.wrapped else model
        if not hasattr(causal, "model") or not hasattr(causal.model, "rotary_emb"):
            raise RequestError(f"{job.model}: only Llama-shaped models are traced in a pipeline")
        return _Rank(job, causal, layout, rank).peak_bytes()


class _Rank:
    """The stages of one rank, their optimizer and their schedule."""

    def __init__(self, job: Job, causal: Any, layout: Layout, rank: int) -> None:
        self.job, self.layout = job, layout
        cuts = bounds(len(causal.model.layers), layout.pp * layout.chunks)
        own = range(rank, layout.pp * layout.chunks, layout.pp)
        self.first, self.last = rank == 0, rank == layout.pp - 1
        self.modules = torch.nn.ModuleList(Stage(causal, cuts[i], cuts[i + 1]) for i in own)
        self.vocab = causal.config.vocab_size
        hidden, dtype = causal.config.hidden_size, causal.model.embed_tokens.weight.dtype
        shape = (job.micro_batch, job.seq_len or 1)
        number = layout.pp * layout.chunks
        ids = torch.empty(shape, dtype=torch.int64, device="meta")
        state = torch.empty(*shape, hidden, dtype=dtype, device="meta", requires_grad=True)
        logits = torch.empty(*shape, self.vocab, dtype=dtype, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                module,
                i,
                number,
                torch.device("cpu"),
                input_args=(ids if i == 0 else state,),
                output_args=(logits if i == number - 1 else state,),
            )
            for i, module in zip(own, self.modules, strict=True)
        ]
        kind = getattr(schedules, _SCHEDULES[layout.schedule])
        single = layout.schedule in ("gpipe", "1f1b")
        self.schedule = kind(stages[0] if single else stages, job.grad_accum, loss_fn=self._loss, scale_grads=False)
        self.schedule._warmup_p2p = _settled  # its ranks vote on what each is told here anyway
        self.optimizer = optim.make(job, self.modules)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """transformers.loss.loss_utils.ForCausalLMLoss."""
        padded = torch.nn.functional.pad(labels, (0, 1), value=-100)
        flat = logits.float().view(-1, self.vocab)
        return torch.nn.functional.cross_entropy(flat, padded[..., 1:].contiguous().view(-1))

    def _step(self) -> None:
        ids = torch.ones(self.job.micro_batch * self.job.grad_accum, self.job.seq_len or 1, dtype=torch.int64)
        given = (ids,) if self.first else ()
        labels = ids.clone()  # every rank loads the whole batch
        target = {"target": labels} if self.last else {}
        self.schedule.step(*given, **target, return_outputs=False)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_bytes(self) -> int:
        self._step()
        recorder = Recorder()
        recorder.phase = "forward"
        for name, tensor in (*self.modules.named_parameters(), *self.modules.named_buffers()):
            recorder.add(tensor, "parameter", name)
        for _, key, value in self.optimizer.states():
            if isinstance(value, torch.Tensor) and key != "step":
                recorder.add(value, "optimizer", key)
        for tensor in self._buffers():
            recorder.add(tensor, "outputs", "")
        with recorder:
            self._step()
        return _peak(recorder)

    def _buffers(self) -> Iterator[torch.Tensor]:
        """What the stages receive into."""
        stages = getattr(self.schedule, "_stages", None) or [self.schedule._stage]
        for stage in stages:
            for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
                for info in infos:
                    if getattr(info, "buffer", None) is not None:
                        yield info.buffer


def _settled(stages: list[Any], *_: Any) -> None:
    """All stages know the shapes of what they receive."""
    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


def _peak(recorder: Recorder) -> int:
    alive = most = 0
    for event in recorder.events:
        alive += event.bytes if event.action == "alloc" else -event.bytes
        most = max(most, alive)
    return most


@contextmanager
def _group(world: int, rank: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
