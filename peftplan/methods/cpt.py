"""Context-aware prompt tuning: examples as a prompt, moved a little, with a loss of its own (CPT, arXiv:2410.17222).

Trains: one change per token of `cpt_token_ids` x hidden; the tokens' embeddings lie frozen beside it, both in fp32.
Keeps for backward: as prompt_tuning, and the loss a second time: the model's own is computed, then thrown away for
PEFT's, on logits of the model's dtype. At the height of the forward both are there.
Not modelled: which tokens of a batch are labels: all of them are taken for it, as PEFT does without `input_type_mask`
where the types of the prompt end on a multiple of 4 (errs high by some 12 bytes a token that is none); temporaries of
the projection that keeps the changes small.
Mirrors peft/tuners/cpt/model.py CPTEmbedding and peft/peft_model.py _cpt_forward, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.blocks.setup import Batch
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Graph, Op, Region, Tensor
from peftplan.graph.edit import writing
from peftplan.graph.ops import Hold, LogSoftmax, Make, NllLoss, internal
from peftplan.methods import _prompts, _virtual
from peftplan.methods._saved import save_modules
from peftplan.methods.base import Family, Host, Method
from peftplan.units import DType

HARMLESS = _virtual.HARMLESS | {
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "tokenizer_name_or_path",
    "opt_weighted_loss_type", "opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon",
}  # fmt: skip
"""CPTConfig sets the first three itself."""
FP32, BOOL, INT64 = DType.float32, DType.boolean, DType.int64


@final
@dataclass(frozen=True)
class Cpt(Method):
    """PEFT's CPTConfig, the knobs that change memory."""

    cpt_token_ids: tuple[int, ...] = (0,)
    cpt_mask: tuple[int, ...] | None = None
    cpt_tokens_type_mask: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    family: ClassVar[Family] = "soft prompt"

    @property
    def _types(self) -> tuple[int, ...]:
        return (1,) * len(self.cpt_token_ids) if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask

    def seen(self, batch: Batch) -> Batch:
        return _prompts.longer(batch, len(self.cpt_token_ids))

    def apply(self, graph: Graph, host: Host) -> Graph:
        tokens, hidden = len(self.cpt_token_ids), host.arch.hidden
        if {len(self._types), len(self.cpt_mask or self._types)} != {tokens}:
            raise RequestError("method.cpt_mask, cpt_tokens_type_mask: give one number per token of cpt_token_ids")
        _virtual.check_saved(self.modules_to_save)
        shape = (graph.regions[0].exit.shape[0], tokens, hidden)

        def encode(b: Builder, ids: Tensor) -> Tensor:
            """CPTEmbedding.forward, repeated for every sequence."""
            frozen = Tensor("@prompt_encoder.embedding.weight", (tokens, hidden), FP32, ADAPTER)
            before = b.plain("prompt_before", 1, tokens, hidden, dtype=FP32, ins=(ids, frozen))
            change = _prompts.lookup(b, ids, tokens, hidden, path="delta_embedding")
            return b.copy(b.add(before, change, label="prompt"), *shape, label="prompts", grad_copied=shape[0] > 1)

        longer = _prompts.prepend(graph, host, tokens, encode)
        first, *middle, head = longer.regions
        labels = next(op.out for op in first.ops if op.out.name == "@long_labels")
        front, types = _typed(first, host, labels, tokens)
        replaced = _Loss(head, host, labels, types, self._types).region()
        return save_modules(replace(longer, regions=(front, *middle, replaced)), self.modules_to_save)


def _typed(first: Region, host: Host, labels: Tensor, tokens: int) -> tuple[Region, Tensor]:
    """What _cpt_forward makes to find the labels, and holds: the types of all tokens are (B, S) in fp32."""
    b = Builder(host.numerics)
    size, seq = labels.shape
    given = b.plain("input_type_mask", size, seq - tokens, dtype=FP32)
    prefix = b.plain("prefix_type_mask", size, tokens, dtype=INT64)
    types = b.make("cpt_type_mask", size, seq, dtype=FP32, ins=(given, prefix))
    chosen = b.plain("labels_idx", size, seq, dtype=BOOL, ins=(types,))
    held = (*first.held, *(t.name for t in (given, prefix, types, chosen)))
    return replace(first, ops=(*b.ops, *first.ops), held=held), types


class _Loss:
    """CPTEmbedding.calculate_loss on top of the model's own loss."""

    def __init__(self, head: Region, host: Host, labels: Tensor, types: Tensor, prefix: tuple[int, ...]) -> None:
        self.head = head
        self.labels = labels
        self.types = types
        answers = [kind for kind in prefix[1:] if kind > 0 and kind % 4 == 0]
        size, seq = labels.shape
        self.chosen = size * (len(answers) + seq - len(prefix))
        """How many labels there are."""
        self.kinds = len({*answers, max(prefix) + 4})
        self.b = Builder(host.numerics, "cpt_")

    def region(self) -> Region:
        first = next(i for i, op in enumerate(self.head.ops) if op.site == "loss")
        if not any(isinstance(op, LogSoftmax) for op in self.head.ops):
            raise Unsupported(
                "method cpt computes its loss from logits, which loss.style=fused_head never makes, nor do fused "
                "--kernels; use others"
            )
        logits = next(op.out for op in reversed(self.head.ops[:first]) if not isinstance(op, Hold))
        before = self._thrown_away(self.head.ops[first:])
        with self.b.marked("loss"):
            loss = self._loss(logits, before)
        ops = (*self.head.ops[:first], *self.b.ops)
        return replace(self.head, ops=writing(ops, loss, self.head.exit))

    def _thrown_away(self, ops: tuple[Op, ...]) -> tuple[Tensor, ...]:
        """The model's own loss, whose graph nobody runs backward; returns what that keeps until it goes."""
        mine = writing(ops, self.head.exit, self.head.exit._replace(name="own_loss"))
        everyone = {t.name for op in mine for t in op.ins}
        kept: list[Tensor] = []
        for op in mine:
            self.b.ops.append(op if isinstance(op, Hold) else _dead(op))
            if isinstance(op, NllLoss):
                kept += (self.b.plain("total_weight", dtype=op.total_weight.dtype), op.out, *op.saved(everyone)[:-1])
        return tuple(kept)

    def _loss(self, logits: Tensor, before: tuple[Tensor, ...]) -> Tensor:
        b = self.b
        size, seq, vocab = logits.shape
        rows = (size, seq - 1)
        shifted = b.slice(logits, *rows, vocab, label="but_last")
        if size > 1:  # the rows of one sequence are contiguous already
            shifted = b.copy(shifted, label="shift_logits")
        targets, types = (self._shift(t, rows, label) for t, label in ((self.labels, "labels"), (self.types, "types")))
        wanted = b.plain("labels_bool", *rows, dtype=BOOL, ins=(targets,))
        each = self._cross_entropy(shifted, targets)
        weights = b.plain("labels_weights", *rows, dtype=FP32, ins=(wanted,))
        decay = b.plain("decay", seq - 1, dtype=FP32, ins=(types,))
        last = b.plain("idx_labels", seq - 1, dtype=BOOL, ins=(types,))
        kinds = b.plain("labels_ids", 2, self.kinds, dtype=FP32, ins=(types,))  # and the one that was last
        grads = (Grad(each, each.logical_bytes),)
        picked = b.formula("picked", Tensor("", (self.chosen,), each.dtype), each, wanted, keeps=(wanted,), grads=grads)
        picked_weights = b.plain("picked_weights", self.chosen, dtype=FP32, ins=(weights, wanted))
        weighted = b.mul(picked, picked_weights, label="weighted")
        grads = (Grad(weighted, weighted.logical_bytes),)
        loss = b.formula("mean", Tensor("", (), FP32), weighted, grads=grads)
        b.hold(shifted, targets, types, wanted, each, weights, decay, last, kinds, *before)
        return loss

    def _shift(self, t: Tensor, rows: tuple[int, int], label: str) -> Tensor:
        """`t[..., 1:].contiguous()`, which for one sequence is itself."""
        return t if rows[0] == 1 else self.b.plain(label, *rows, dtype=t.dtype, ins=(t,))

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """reduction="none", in the logits' dtype; autocast computes it in fp32."""
        b = self.b
        if b.numerics.autocast is not None:
            logits = b.cast(logits, FP32, label="logits32")
        count = logits.shape[0] * logits.shape[1]
        scores = Tensor("cpt_log_softmax", (count, logits.shape[-1]), logits.dtype)
        b.ops.append(LogSoftmax(name=scores.name, ins=(logits,), out=scores, site="loss"))
        each = Tensor("cpt_each", (count,), logits.dtype)
        weight = internal(each.name, "total_weight", (), logits.dtype)
        b.ops.append(NllLoss(name=each.name, ins=(scores, targets), out=each, total_weight=weight, site="loss"))
        b.hold(logits)
        return each


def _dead(op: Op) -> Op:
    """What an op makes, without a gradient."""
    return Make(name=op.name, ins=op.ins, out=op.out, temporary_bytes=op.scratch_bytes(), site=op.site)


METHOD = Cpt
EXAMPLES = (Cpt(cpt_token_ids=(1, 2, 3, 4), cpt_tokens_type_mask=(1, 2, 3, 4)), Cpt(cpt_token_ids=(5,) * 20))
UNVERIFIED: dict[str, str] = {}
