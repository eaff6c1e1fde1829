"""One of two real ranks: a tiny model that transformers splits, one step over gloo, and what this rank holds.

python -m tests.oracles.two_ranks RANK STORE CONFIG.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from peftplan.instruments import ranks
from peftplan.layouts import Layout


def main(rank: int, store: str, config: dict[str, Any]) -> dict[str, int]:
    """Bytes of this rank's parameters, gradients and optimizer states, and the loss in millionths."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))
    layout: Layout = ranks.layout_of_job(_job())
    with torch.device("meta"), ranks.untied(layout):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model = ranks.spread(model, layout)
    model.tie_weights()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            ranks.local(param).normal_(std=0.02)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(3 * 17).reshape(3, 17) % config["vocab_size"]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = sum(_bytes(p.grad) for p in model.parameters() if p.grad is not None)
    optimizer.step()
    states = sum(_bytes(v) for state in optimizer.state.values() for v in state.values())
    found = {
        "weights": sum(_bytes(p) for p in model.parameters()),
        "gradients": gradients,
        "states": states,
        "loss": round(loss.item() * 1e6),
    }
    dist.destroy_process_group()
    return found


def _job() -> Any:
    from peftplan.job import make_job

    return make_job(model="llama", layout="tp=2")


def _bytes(tensor: torch.Tensor) -> int:
    part: torch.Tensor = ranks.local(tensor)
    return int(part.numel() * part.element_size())


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")))))
