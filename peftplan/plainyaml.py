"""YAML loaders for plain data. PlainLoader: the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3.2).

Mappings, lists, text, true/false, null, decimal integers and floats; no anchors (no expansion bombs), no tags
(no objects), no key twice.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""yaml.safe_load's rules, by libyaml where the wheel has it."""


def check_events(text: str) -> None:
    """Raises yaml.YAMLError where the text holds an anchor, an alias or a tag."""
    for event in yaml.parse(text, Loader=FAST):
        refuse_node(event)


def refuse_node(event: Any) -> None:
    """Raises yaml.YAMLError for an alias, an anchor (no expansion bombs) or an explicit tag (no objects)."""
    if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
        _refuse("anchors and aliases are not read", event)
    if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag is not None:
        _refuse("tags are not read", event)


def _refuse(problem: str, event: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)


class PlainLoader(yaml.SafeLoader):
    """`yaml.load(text, Loader=PlainLoader)`; raises yaml.YAMLError."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - pyyaml's own class-level registry

    def compose_node(self, parent: Any, index: Any) -> Any:
        refuse_node(self.peek_event())  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)


def _mapping(loader: PlainLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int, float, bool)) or key in result:
            problem = f"{key!r} twice" if isinstance(key, str) else "a key must be one word"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _text(loader: PlainLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


def _whole(loader: PlainLoader, node: yaml.ScalarNode) -> int:
    return int(_text(loader, node))


def _real(loader: PlainLoader, node: yaml.ScalarNode) -> float:
    return float(_text(loader, node))


def _switch(loader: PlainLoader, node: yaml.ScalarNode) -> bool:
    return _text(loader, node).lower() == "true"


def _resolve(tag: str, pattern: str, first: str) -> None:
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_resolve("null", r"^(?:~|null|Null|NULL|None|)$", "~nN\0")
_resolve("int", r"^[-+]?[0-9]+$", "-+0123456789")
_resolve("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789")
PlainLoader.yaml_implicit_resolvers[""] = PlainLoader.yaml_implicit_resolvers.get("\0", [])
PlainLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
PlainLoader.add_constructor("tag:yaml.org,2002:int", _whole)
PlainLoader.add_constructor("tag:yaml.org,2002:float", _real)
PlainLoader.add_constructor("tag:yaml.org,2002:bool", _switch)
