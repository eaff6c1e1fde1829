"""Files of plain data, read safely: YAML or JSON, bounded in size, no tags, no anchors, nothing executed.

Two dialects of YAML. `plain` is what people mean (YAML 1.2): `1e-4` is a number, `no` and `1:30` are text, no key
comes twice. `pyyaml` is what the trainers see, who call yaml.safe_load (YAML 1.1): `no` is false, `1e-4` is text, of
two equal keys the last one counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from peftplan.errors import BadFile

Dialect = Literal["plain", "pyyaml"]
MAX_JSON_BYTES = 16 * 2**20
MAX_YAML_BYTES = 2**20
"""YAML is read by pure Python at about 0.3 MB/s (measured 2026-11): a larger file belongs in JSON."""


def load(path: Path, *, dialect: Dialect = "plain") -> Any:
    """The data in a YAML or JSON file. Raises BadFile, which names the file and the line."""
    return parse(text_of(path), str(path), dialect=dialect)


def text_of(path: Path) -> str:
    """A text file of at most 16 MiB. Raises BadFile."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise BadFile(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB; this is not a configuration file")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, ValueError):
        raise BadFile(f"{path}: not a text file; write YAML or JSON in UTF-8") from None


def parse(text: str, name: str, *, dialect: Dialect = "plain") -> Any:
    """The data that `text` holds, `name` being what errors call it. Raises BadFile."""
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text, parse_constant=_no_constant)
        if len(text) > MAX_YAML_BYTES:
            raise ValueError(f"YAML larger than {MAX_YAML_BYTES >> 20} MiB; write it as JSON")
        return plain(text) if dialect == "plain" else _pyyaml(text)
    except RecursionError:
        raise BadFile(f"{name}: nested too deeply") from None
    except ValueError as error:
        raise BadFile(f"{name}: {error}") from None


def plain(text: str) -> Any:
    """Data from YAML of the dialect `plain`. Raises ValueError with one short line."""
    from peftplan.plainyaml import PlainLoader

    return _yaml(text, PlainLoader)


def kind(data: Any) -> str:
    """What was found, for messages."""
    return "nothing" if data is None else f"a {type(data).__name__}"


def _pyyaml(text: str) -> Any:
    from peftplan.plainyaml import FAST, check_events

    return _yaml(text, FAST, check_events)


def _yaml(text: str, loader: Any, check: Any = None) -> Any:
    import yaml

    try:
        if check is not None:
            check(text)
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number a job can hold")
