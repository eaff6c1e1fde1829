"""Layouts as people write them: `zero3`, `fsdp`, `hsdp`, `tp=4,pp=2,dp=2`, `fsdp,tp=8,sp`, `ddp`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from peftplan.errors import RequestError, UnknownName
from peftplan.graph.mesh import Context, Mesh
from peftplan.layouts.base import SINGLE, DataParallel, Framework, Layout, Schedule

STYLES: dict[str, DataParallel] = {
    "ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "zero_1": "zero1", "zero_2": "zero2",
    "zero_3": "zero3", "fsdp": "fsdp2", "fsdp1": "fsdp1", "fsdp2": "fsdp2", "hsdp": "fsdp2",
}  # fmt: skip
"""`fsdp` is FSDP2, `fully_shard`, the one that torch maintains."""
DEGREES = ("dp", "tp", "pp", "cp", "ep", "fsdp", "hsdp", "dp_shard", "dp_replicate", "ulysses", "ring", "vpp")
FLAGS = ("sp", "none", "single")


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """What a text says, before the machine is known."""

    style: DataParallel | None
    hybrid: bool
    sequence: bool | None
    degrees: Mapping[str, int]

    @property
    def product(self) -> int:
        """Ranks of one replica: what of the world is no data parallelism."""
        return prod(self.degrees.get(key, 1) for key in ("tp", "pp", "cp"))

    @property
    def replicas(self) -> int | None:
        """Replicas, where they are stated."""
        stated = [self.degrees[key] for key in ("dp", "fsdp", "hsdp") if key in self.degrees]
        if "dp_shard" in self.degrees:
            stated.append(self.degrees["dp_shard"] * self.degrees.get("dp_replicate", 1))
        if len(set(stated)) > 1:
            raise RequestError(f"--layout names {stated[0]} and {stated[1]} replicas; give dp= once")
        return stated[0] if stated else None


def read(text: str) -> Words:
    """The words of a layout. Raises RequestError for those it does not know."""
    style: DataParallel | None = None
    hybrid, sequence = False, None
    degrees: dict[str, int] = {}
    for word in (w.strip().lower().replace("-", "_") for w in text.replace("+", ",").split(",")):
        key, equals, value = word.partition("=")
        if equals:
            degrees[_degree_name(key)] = _degree(key, value)
            style = style or STYLES.get(key)
            sequence = True if key == "sp" and value == "true" else sequence
        elif word in STYLES:
            if style not in (None, STYLES[word]):
                raise RequestError(f"--layout {text}: {style} and {word} exclude each other; give one")
            style, hybrid = STYLES[word], hybrid or word == "hsdp"
        elif word == "sp":
            sequence = True
        elif word not in FLAGS:
            raise UnknownName("layout", word, (*STYLES, *FLAGS, *(f"{d}=N" for d in DEGREES)))
    if "ulysses" in degrees or "ring" in degrees:
        degrees["cp"] = degrees.get("ulysses") or degrees["ring"]
    return Words(style=style, hybrid=hybrid, sequence=sequence, degrees=degrees)


def _degree_name(key: str) -> str:
    if key not in DEGREES:
        raise UnknownName("layout degree", key, DEGREES, "layouts are written tp=4,pp=2,dp=2")
    return key


def _degree(key: str, value: str) -> int:
    if not value.isdigit() or not 1 <= int(value) <= 10**6:
        raise RequestError(f"--layout {key}={value}: give a whole number of ranks, 1 or more")
    return int(value)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Settings `layout.*` of pipelines, context parallelism and whose code runs."""

    schedule: Schedule | None = None
    """1f1b, or interleaved where a rank has several chunks."""
    uneven: bool = False
    context: Context = "ring"
    framework: Framework = "torch"


PIPELINE_KEYS = frozenset(Pipeline.__dataclass_fields__)


def layout_of(text: str | None, *, gpus: int, nodes: int, settings: Pipeline | None = None) -> Layout:
    """The layout that `text` names on nodes x gpus ranks.

    Without `dp=` the replicas are what the other degrees leave of the world; hybrid sharding shards within a node.
    """
    world = gpus * nodes
    words = read(text or ("ddp" if world > 1 else "none"))
    settings = settings or Pipeline()
    dp = _replicas(words, world, text)
    style = words.style or ("ddp" if dp > 1 else "none")
    degrees = words.degrees
    chunks = degrees.get("vpp", 1)
    tp = degrees.get("tp", 1)
    layout = Layout(
        style=style,
        dp=dp,
        shards=1 if style in ("none", "ddp") else _shards(words, dp, gpus),
        mesh=Mesh(
            tp=tp,
            sequence=bool(words.sequence) and tp > 1,
            cp=degrees.get("cp", 1),
            context="ulysses" if "ulysses" in degrees else settings.context,
            ep=degrees.get("ep", 1),
            plan="megatron" if settings.framework == "megatron" else "transformers",
        ),
        pp=degrees.get("pp", 1),
        schedule=settings.schedule or ("interleaved" if chunks > 1 else "1f1b"),
        chunks=chunks,
        uneven=settings.uneven,
        framework=settings.framework,
    )
    return SINGLE if layout.alone and layout.style in ("none", "ddp") else layout


def _replicas(words: Words, world: int, text: str | None) -> int:
    stated, rest = words.replicas, words.product
    if world % rest or (stated is not None and stated * rest != world):
        asked = f"{stated or 'dp'} x {rest}" if stated or rest > 1 else str(rest)
        needed = rest * (stated or max(1, world // rest))
        raise RequestError(
            f"--layout {text} takes {asked} ranks, but --gpus and --nodes give {world}; give {needed} GPUs, "
            f"or degrees whose product divides {world}"
        )
    return stated or world // rest


def _shards(words: Words, dp: int, gpus: int) -> int:
    """Replicas that share the shards."""
    if "dp_shard" in words.degrees:
        return words.degrees["dp_shard"]
    shards = dp // words.degrees["dp_replicate"] if "dp_replicate" in words.degrees else dp
    if words.hybrid and shards == dp:
        shards = min(dp, max(1, gpus // words.product))
    if dp % shards:
        raise RequestError(f"--layout: {dp} replicas do not split into groups of {shards}; give dp_shard= a divisor")
    return shards


def stated_world(text: str | None) -> int:
    """How many GPUs a text asks for by itself; 1 where it leaves that open."""
    words = read(text or "none")
    return words.product * (words.replicas or 1)


def knobs_of(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of the pipeline, the style's)."""
    own = {key: value for key, value in given.items() if key in PIPELINE_KEYS}
    return own, {key: value for key, value in given.items() if key not in PIPELINE_KEYS}
