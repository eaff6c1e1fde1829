"""Which type llama.cpp's quantize gives each tensor of a GGUF file, and what a type takes.

Blocks: ggml's block sizes (gguf 0.19.0, constants.py, GGML_QUANT_SIZES). Mixtures: src/llama-quant.cpp at 007dbbf
(2026), llama_tensor_get_type_impl, for models without experts.
"""

from __future__ import annotations

from peftplan.errors import UnknownName

BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17),
}  # fmt: skip
"""Type -> weights of a block, and its bytes."""
BASE: dict[str, str] = {
    **{name: name for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q6_K", "IQ1_S",
                               "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")},
    "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S",
}  # fmt: skip
"""File type -> the type of most of its tensors."""
_LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")
_LOWISH = ("IQ2_S", "IQ2_M")
_OUT = {**dict.fromkeys((*_LOW, *_LOWISH, "IQ3_XXS"), "Q5_K")}
_EMBEDDING = {**dict.fromkeys(_LOW, "Q2_K"), **dict.fromkeys((*_LOWISH, "IQ3_XXS"), "IQ3_S")}
_ATTENTION_OUT = {
    "Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K", "IQ1_S": "IQ2_XXS",
    "IQ1_M": "IQ2_XXS", **dict.fromkeys(_LOWISH, "IQ3_S"),
}  # fmt: skip
_QUERY_KEY = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
_SHARED_VALUES = {
    **dict.fromkeys((*_LOW, *_LOWISH, "Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"), "Q4_K"),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), "Q5_K"),
}
"""Of values where four query heads or more share one."""
_OWN_VALUES = {**dict.fromkeys(_LOW, "Q2_K"), **dict.fromkeys(_LOWISH, "IQ3_S"), "Q2_K": "Q3_K"}
_FIRST = {"Q2_K_S": "Q4_K", "IQ3_M": "Q4_K", "Q4_K_S": "Q5_K", **dict.fromkeys(_LOW, "Q2_K"),
          **dict.fromkeys(_LOWISH, "IQ3_S")}  # fmt: skip
"""Of the down projections of the first eighth of the layers."""
_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"), "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
_SEVENTY_B_LAYERS = 80


def packed_bytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of a tensor, whose rows are made of whole blocks."""
    block, size = BLOCKS[kind]
    return rows * columns // block * size


def fitting(kind: str, columns: int) -> str:
    """The type itself, or what takes its place where its blocks do not divide a row."""
    if columns % BLOCKS[kind][0] == 0:
        return kind
    other = _FALLBACK.get(kind, "F16")
    return other if columns % BLOCKS[other][0] == 0 else "F16"


def type_of(file_type: str, part: str, index: int, *, layers: int, group: int, imatrix: bool) -> str:
    """The type of a matrix: `part` is a site of the graph (`q`, `down`, `embed`, `head`), `group` how many query heads
    share a key, `imatrix` whether quantize had an importance matrix. Raises UnknownName for other file types."""
    if file_type not in BASE:
        raise UnknownName("format.file_type", file_type, BASE)
    base = BASE[file_type]
    if base in ("F32", "F16", "BF16"):
        return base
    if part == "head":
        return "Q8_0" if base == "Q8_0" else _OUT.get(file_type, "Q6_K")
    if part == "embed":
        return _EMBEDDING.get(file_type, base)
    if part in ("v", "qkv"):
        unguided = file_type == "IQ3_XXS" and group < 4 and not imatrix
        return "IQ3_S" if unguided else _values(file_type, base, index, layers, group)
    if part == "down":
        return _down(file_type, base, index, layers, imatrix=imatrix)
    if part in ("gate", "up", "gate_up"):
        middle = layers // 8 <= index < 7 * layers // 8
        return "IQ3_XXS" if file_type == "IQ3_XS" and middle else base
    if part == "o":
        return _ATTENTION_OUT.get(file_type, base)
    return _QUERY_KEY.get(file_type, base)


def _more(index: int, layers: int) -> bool:
    """Whether a layer is one of those that get more bits: the first and last eighths, and every third between."""
    eighth = layers // 8
    return index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2


def _values(file_type: str, base: str, index: int, layers: int, group: int) -> str:
    found = (_SHARED_VALUES if group >= 4 else _OWN_VALUES).get(file_type, base)
    if file_type == "IQ3_M":
        found = "Q4_K"
    elif file_type in ("Q3_K_M", "Q3_K_L"):
        found = "Q4_K" if file_type == "Q3_K_M" and index >= 2 else "Q5_K"
    elif file_type in ("Q4_K_M", "Q5_K_M") and _more(index, layers):
        found = "Q6_K"
    elif file_type == "Q4_K_S" and index < 4:
        found = "Q5_K"
    return "Q5_K" if layers == _SEVENTY_B_LAYERS and found in ("Q3_K", "Q4_K") and file_type not in _LOW else found


def _down(file_type: str, base: str, index: int, layers: int, *, imatrix: bool) -> str:
    always = {"Q2_K": "Q3_K", "Q3_K_M": "Q5_K" if index < layers // 16 else "Q4_K", "Q3_K_L": "Q5_K"}
    if file_type in always:
        return always[file_type]
    if file_type in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more(index, layers) else base
    if index >= layers // 8:
        return "Q3_K" if file_type == "IQ3_XXS" and not imatrix else base
    unguided = {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K", "IQ3_XXS": "Q4_K"}
    return (_FIRST | ({"Q4_0": "Q4_1", "Q5_0": "Q5_1"} if imatrix else unguided)).get(file_type, base)
