"""Whose modelling code runs the decoder: what releases of transformers, and libraries with layers of their own, do
otherwise than transformers 5.23.

transformers 4.57.6 (models/llama/modeling_llama.py): rotary angles are a matrix product, the frequencies are kept
once. adapters 1.3.0 (models/llama/modeling_llama.py, models/mistral/modeling_mistral.py): attention copies queries,
keys and values head by head (composition.py, match_attn_matrices_for_parallel) and takes the cache by a name that
transformers 4.57 no longer gives it, so that nothing is cached; Mistral's layers repeat the positions for every row
(adjust_tensors_for_parallel_).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Modeling:
    """The switches."""

    rotary_product: bool = False
    """Whether rotary angles come out of a matrix product."""
    frequency_tables: int = 2
    """How many copies of the rotary frequencies the model holds."""
    mask_given: bool = False
    """Whether every batch comes with a mask of its tokens, padded or not."""
    copies_heads: bool = False
    """Whether attention copies queries, keys and values before anything else."""
    drops_cache: bool = False
    """Whether a cache that is asked for stays empty."""
    repeats_positions: bool = False
    """Whether positions are repeated for every row of the batch."""


TRANSFORMERS_5 = Modeling()
TRANSFORMERS_4 = Modeling(rotary_product=True, frequency_tables=1, mask_given=True)
ADAPTERS_LLAMA = replace(TRANSFORMERS_4, copies_heads=True, drops_cache=True)
ADAPTERS_MISTRAL = replace(ADAPTERS_LLAMA, repeats_positions=True)
