"""From the process to the command and back: exit codes, one-line errors, closed pipes, Ctrl-C.

Exit codes: 0 done, 1 `check`: over budget, 2 the request is wrong, 3 the outside failed, 70 a defect in peftplan (with
its traceback), 130 interrupted, 141 the reader of the output went away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

INTERRUPTED, DEFECT, READER_GONE = 130, 70, 141
MAX_LINE = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `peftplan` with `arguments` (the process's own where None) and return the exit code."""
    try:
        return _reply(_run(sys.argv[1:] if arguments is None else list(arguments)))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_gone()


def _run(arguments: list[str]) -> Any:
    """What the command returned: a text to print, or an exit code."""
    import typer

    from peftplan.cli.app import UsageError, app
    from peftplan.errors import PeftplanError

    try:
        return app(arguments, prog_name="peftplan", standalone_mode=False)
    except UsageError as error:
        return _complain(_usage_line(error), 2)
    except PeftplanError as error:
        return _complain(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception:
        return _defect()


def _reply(result: Any) -> int:
    from peftplan.cli.output import Reply

    if isinstance(result, Reply):
        _say(result.text)
        return _complain(result.complaint, result.exit_code) if result.complaint else result.exit_code
    if not isinstance(result, str):
        return result or 0
    _say(result)
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def _complain(message: str, code: int) -> int:
    """One line on stderr, whatever the message held."""
    from peftplan.report.words import printable

    line = printable(" ".join(message.split()))
    print("error:", line if len(line) <= MAX_LINE else line[:MAX_LINE] + " ...", file=sys.stderr)
    return code


def _usage_line(error: Any) -> str:
    text = str(error.format_message()).rstrip(".")
    if getattr(error, "possibilities", None):  # an unknown option that resembles others
        text = f"no such option {error.option_name}{_nearest(error.option_name, error.possibilities)}"
    return text[:1].lower() + text[1:] + _where_help_is(error.ctx)


def _nearest(name: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.65)
    return f"; did you mean {near[0]}?" if near else ""


def _where_help_is(context: Any) -> str:
    return "" if context is None else f" (see `{context.command_path} --help`)"


def _defect() -> int:
    import traceback

    traceback.print_exc()
    return _complain("this is a defect in peftplan; please report it with the lines above", DEFECT)


def _reader_gone() -> int:
    """Point stdout at nothing, so that the interpreter's last flush stays silent too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return READER_GONE
