"""P-tuning: a trained network makes the embeddings in front of every sequence (Liu 2021, arXiv:2103.10385, section 3).

Trains: num_virtual_tokens x hidden, and an encoder of three linear layers, or of an LSTM in both directions, some 32 x
encoder_hidden_size^2 weights a layer, and two linear layers.
Keeps for backward: the encoder's activations, of one sequence whatever the batch; every activation of the model is
that many positions longer, logits included.
Not modelled: packed batches; FLOPs of the LSTM and what cuDNN needs for a moment (`_lstm.py` says how they err).
Mirrors peft/tuners/p_tuning/model.py PromptEncoder and PeftModelForCausalLM.forward, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor
from peftplan.methods import _branches, _prompts, _virtual
from peftplan.methods._lstm import Lstm
from peftplan.methods._virtual import Prompt, VirtualTokens, repeated

HARMLESS = _virtual.HARMLESS


@final
@dataclass(frozen=True)
class PTuning(VirtualTokens):
    """PEFT's PromptEncoderConfig, the knobs that change memory."""

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    """Of the LSTM: the MLP has three whatever this says."""
    encoder_dropout: float = 0.0

    def check(self) -> None:
        _branches.check_share("encoder_dropout", self.encoder_dropout)
        if self.encoder_num_layers < 1:
            raise RequestError(f"method.encoder_num_layers={self.encoder_num_layers}: use at least 1")

    def encode(self, b: Builder, ids: Tensor, prompt: Prompt) -> Tensor:
        """PromptEncoder.forward."""
        inner = self.encoder_hidden_size or prompt.hidden
        x = _prompts.lookup(b, ids, prompt.tokens, prompt.hidden)
        head = self._lstm if self.encoder_reparameterization_type == "LSTM" else _mlp
        out = head(b, x, inner)
        b.hold(x)
        return repeated(b, out, prompt)

    def _lstm(self, b: Builder, x: Tensor, inner: int) -> Tensor:
        layers, dropout = self.encoder_num_layers, self.encoder_dropout
        lstm = Lstm(path="prompt_encoder.lstm_head", inner=inner, layers=layers, dropout=dropout)
        h = b.squash(_prompts.linear(b, lstm.forward(b, x), 2 * inner, "mlp_head.0"), label="relu")
        return _prompts.linear(b, h, x.shape[-1], "mlp_head.2")


def _mlp(b: Builder, x: Tensor, inner: int) -> Tensor:
    h = b.squash(_prompts.linear(b, x, inner, "mlp_head.0"), label="relu")
    h = b.squash(_prompts.linear(b, h, inner, "mlp_head.2"), label="relu")
    return _prompts.linear(b, h, x.shape[-1], "mlp_head.4")


METHOD = PTuning
EXAMPLES = (
    PTuning(num_virtual_tokens=20),
    PTuning(num_virtual_tokens=5, encoder_hidden_size=128, encoder_reparameterization_type="LSTM"),
)
UNVERIFIED: dict[str, str] = {}
