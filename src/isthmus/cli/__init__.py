"""The command line: parse, call, print."""

from isthmus.cli.commands import main

__all__ = ["main"]
