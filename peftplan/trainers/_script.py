"""Python training scripts whose choices are one literal: `CONFIG = {...}`, read without running anything."""

from __future__ import annotations

import ast
from typing import Any

from peftplan.errors import BadFile

NAME = "CONFIG"


def constants(text: str, *, name: str) -> dict[str, Any]:
    """The mapping that a script assigns to CONFIG at its top level. Raises BadFile."""
    try:
        body = ast.parse(text).body
        found = [node.value for node in body if isinstance(node, ast.Assign) and _names(node) == [NAME]]
        data = ast.literal_eval(found[0]) if found else None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadFile(f"{name}: {NAME} is not a plain literal: {_short(error)}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise BadFile(f"{name}: no `{NAME} = {{...}}` in it; only scripts that peftplan wrote are read")
    return data


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _short(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
