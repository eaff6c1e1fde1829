"""P-tuning: a trained network makes the embeddings in front of every sequence (Liu 2021, arXiv:2103.10385, section 3).

Trains: num_virtual_tokens x hidden, and an encoder of three linear layers.
Keeps for backward: the encoder's activations, of one sequence whatever the batch; every activation of the model is
that many positions longer, logits included.
Not modelled: packed batches, the LSTM encoder.
Mirrors peft/tuners/p_tuning/model.py PromptEncoder and PeftModelForCausalLM.forward, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import Unsupported
from peftplan.graph.blocks.decoder import Batch
from peftplan.graph.builder import Builder
from peftplan.graph.core import Graph, Tensor
from peftplan.methods import _prompts
from peftplan.methods.base import Family, Host, Method

HARMLESS = _prompts.HARMLESS | {"num_attention_heads", "num_layers", "encoder_num_layers", "encoder_dropout"}


@final
@dataclass(frozen=True)
class PTuning(Method):
    """PEFT's PromptEncoderConfig, the knobs that change memory."""

    num_virtual_tokens: int | None = None
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    family: ClassVar[Family] = "soft prompt"

    def seen(self, batch: Batch) -> Batch:
        return _prompts.longer(batch, self.num_virtual_tokens)

    def apply(self, graph: Graph, host: Host) -> Graph:
        if self.encoder_reparameterization_type == "LSTM":
            raise Unsupported("method.encoder_reparameterization_type=LSTM is not modelled yet; use MLP")
        tokens, hidden = _prompts.checked_tokens(self.num_virtual_tokens), host.arch.hidden
        _prompts.check_shape(
            token_dim=(self.token_dim, hidden), num_transformer_submodules=(self.num_transformer_submodules, 1)
        )
        inner = self.encoder_hidden_size or hidden

        def encode(b: Builder, ids: Tensor) -> Tensor:
            x = _prompts.lookup(b, ids, tokens, hidden)
            h = b.squash(_prompts.linear(b, x, inner, "mlp_head.0"), label="relu")
            h = b.squash(_prompts.linear(b, h, inner, "mlp_head.2"), label="relu")
            out = _prompts.linear(b, h, hidden, "mlp_head.4")
            b.hold(x)
            return _prompts.repeated(b, out, graph)

        return _prompts.prepend(graph, host, tokens, encode)


METHOD = PTuning
EXAMPLES = (PTuning(num_virtual_tokens=20), PTuning(num_virtual_tokens=5, encoder_hidden_size=128))
UNVERIFIED: dict[str, str] = {}
