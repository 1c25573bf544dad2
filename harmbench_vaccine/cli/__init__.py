"""The command line: each command parses, calls and prints; heavy imports happen inside the commands."""

from .entry import commands, main

__all__ = ["commands", "main"]
