"""The `timo` command."""

from timo.cli.main import main

__all__ = ["main"]
