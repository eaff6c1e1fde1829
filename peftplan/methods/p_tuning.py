"""P-tuning: a trained network makes the embeddings in front of every sequence (Liu 2021, arXiv:2103.10385, section 3).

Trains: num_virtual_tokens x hidden, and an encoder of three linear layers.
Keeps for backward: the encoder's activations, of one sequence whatever the batch; every activation of the model is
that many positions longer, logits included.
Not modelled: packed batches, the LSTM encoder.
Mirrors peft/tuners/p_tuning/model.py PromptEncoder and PeftModelForCausalLM.forward, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from peftplan.errors import Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor
from peftplan.methods import _prompts, _virtual
from peftplan.methods._virtual import Prompt, VirtualTokens, repeated

HARMLESS = _virtual.HARMLESS | {"encoder_num_layers", "encoder_dropout"}


@final
@dataclass(frozen=True)
class PTuning(VirtualTokens):
    """PEFT's PromptEncoderConfig, the knobs that change memory."""

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = None

    def check(self) -> None:
        if self.encoder_reparameterization_type == "LSTM":
            raise Unsupported("method.encoder_reparameterization_type=LSTM is not modelled yet; use MLP")

    def encode(self, b: Builder, ids: Tensor, prompt: Prompt) -> Tensor:
        """PromptEncoder.forward."""
        inner = self.encoder_hidden_size or prompt.hidden
        x = _prompts.lookup(b, ids, prompt.tokens, prompt.hidden)
        h = b.squash(_prompts.linear(b, x, inner, "mlp_head.0"), label="relu")
        h = b.squash(_prompts.linear(b, h, inner, "mlp_head.2"), label="relu")
        out = _prompts.linear(b, h, prompt.hidden, "mlp_head.4")
        b.hold(x)
        return repeated(b, out, prompt)


METHOD = PTuning
EXAMPLES = (PTuning(num_virtual_tokens=20), PTuning(num_virtual_tokens=5, encoder_hidden_size=128))
UNVERIFIED: dict[str, str] = {}
