"""AdaMSS without k-means: rows are dealt into equal clusters, whatever their values, so that weights need none.

PEFT clusters a weight's rows with scikit-learn (peft/tuners/adamss/utils.py, clustering_Z, peft 0.21.2). How many rows
each cluster has decides no sum of bytes or FLOPs as long as none has fewer than `subspace_rank`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

import torch


@contextmanager
def dealt() -> Iterator[None]:
    """Inside, PEFT's AdaMSS clusters so; scikit-learn may be missing."""
    import peft.tuners.adamss.layer as adamss

    original, absent = adamss.clustering_Z, find_spec("sklearn") is None
    adamss.clustering_Z = _deal
    if absent:
        sys.modules["sklearn"] = ModuleType("sklearn")  # its presence is all that AdamssConfig asks for
    try:
        yield
    finally:
        adamss.clustering_Z = original
        if absent:
            del sys.modules["sklearn"]


def _deal(rows: torch.Tensor, wanted: int, _rounds: int) -> tuple[torch.Tensor, int]:
    """(cluster of each row, how many clusters)."""
    count = min(wanted, rows.shape[0])
    return torch.arange(rows.shape[0], device="cpu") % count, count
