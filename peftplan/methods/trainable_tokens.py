"""Trainable tokens: chosen rows of the embedding train, and of the head where it is tied (PEFT 0.21.2's own).

Trains: token_indices x hidden.
Keeps for backward: a whole copy of the embedding where it is the head too; its gradient is as large for a moment.
Not modelled: target_modules as a pattern.
Mirrors peft/tuners/trainable_tokens/model.py, peft 0.21.2; see `_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.core import Graph
from peftplan.methods._linears import COMMON
from peftplan.methods._tokens import train_rows
from peftplan.methods.base import Family, Host, Method
from peftplan.methods.targets import Names

HARMLESS = COMMON | {"init_weights"}


@final
@dataclass(frozen=True)
class TrainableTokens(Method):
    """PEFT's TrainableTokensConfig."""

    token_indices: tuple[int, ...] = ()
    target_modules: Names = None
    family: ClassVar[Family] = "selective"

    def apply(self, graph: Graph, host: Host) -> Graph:
        if not self.token_indices:
            raise RequestError("method.token_indices: say which rows of the embedding train, e.g. [5,6]")
        wanted = self.target_modules or "embed_tokens"
        names = (wanted,) if isinstance(wanted, str) else wanted
        if len(names) > 1 and host.arch.tied:
            raise RequestError(
                "--target-modules: PEFT trains tokens of one of two tied modules; name embed_tokens only"
            )
        return train_rows(graph, dict.fromkeys(names, self.token_indices), host)


METHOD = TrainableTokens
EXAMPLES = (TrainableTokens(token_indices=(1, 2)),)
UNVERIFIED: dict[str, str] = {}
