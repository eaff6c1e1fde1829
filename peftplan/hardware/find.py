"""From what people call a card to its catalog entry."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from peftplan.errors import RequestError, UnknownName
from peftplan.hardware.gpus import Gpu, gpus

_MAKERS = re.compile(r"\b(nvidia|geforce|tesla|amd|instinct|radeon|intel|data center gpu|google|aws)\b")
_VARIANT = re.compile(r"\d+gb|sxm\d*|pcie|nvl|hbm\d*e?")


@lru_cache(maxsize=256)
def find_gpu(name: str) -> Gpu:
    """The card that `name` stands for: a catalog name or alias, the name its driver reports, any case and
    separators, with or without the maker, with or without its memory (`rtx-4090-24gb`).

    A name shared by several variants takes the common one (`variants` lists the rest). Raises UnknownName
    with the nearest names, RequestError for a memory size that the card does not have.
    """
    key = spelling(name)
    gpu = _by_spelling().get(key) or _with_memory(name)
    if gpu is None:
        raise UnknownName("GPU", name, _aliases(), hint=_hint(name))
    return gpu


def variants(name: str) -> Sequence[Gpu]:
    """Other cards that `name` could mean, differing only in form factor or memory (`a100`: four are sold)."""
    chosen, words = find_gpu(name), _words(name)
    return tuple(gpu for gpu in gpus() if gpu is not chosen and _is_variant(gpu, words))


def _is_variant(gpu: Gpu, words: list[str]) -> bool:
    return any(_extends(_words(alias), words) for alias in (gpu.name, *gpu.aliases))


def _extends(longer: list[str], words: list[str]) -> bool:
    rest = longer[len(words) :]
    return longer[: len(words)] == words and all(_VARIANT.fullmatch(word) for word in rest)


def _with_memory(name: str) -> Gpu | None:
    """The card, or variant of it, named before the memory at the end of `name`, that has that much."""
    match = re.fullmatch(r"(.+?)[-_\s]*(?<!\d)(\d+)\s*gi?b", name.strip().lower())
    gpu = _by_spelling().get(spelling(match[1])) if match else None
    if match is None or gpu is None:
        return None
    for candidate in (gpu, *variants(match[1])):
        if candidate.memory.marketed_bytes == int(match[2]) * 10**9:
            return candidate
    raise RequestError(
        f"GPU {name!r}: {gpu.name} has {gpu.memory.marketed_bytes // 10**9} GB, and the catalog holds no "
        f"variant with {match[2]} GB"
    )


def _hint(name: str) -> str:
    if re.match(r"\d+\s*[x*]\s*[a-z]|.+[:*]\s*\d+$", name.lower()):
        return "write the number of cards as --gpus"
    return "`peftplan list gpus` shows all"


@lru_cache(maxsize=1)
def _by_spelling() -> Mapping[str, Gpu]:
    return {spelling(name): gpu for gpu in gpus() for name in (gpu.name, *gpu.aliases)}


def _aliases() -> list[str]:
    return [alias for gpu in gpus() for alias in gpu.aliases]


def spelling(name: str) -> str:
    """`name` without maker, case and separators, but keeping one between digits."""
    return re.sub(r"(?<!\d)-|-(?!\d)", "", "-".join(_words(name)))


def _words(name: str) -> list[str]:
    plain = name.lower().replace("(r)", "").replace("(tm)", "")
    return [word for word in re.split(r"[-_.\s()]+", _MAKERS.sub(" ", plain)) if word]
