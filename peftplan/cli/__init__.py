"""The command line: a command parses its options into a Job, makes one call and returns one report."""

from __future__ import annotations

from peftplan.cli.shell import main

__all__ = ["main"]
