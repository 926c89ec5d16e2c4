"""Where commands print, and how a step's state looks there."""

from __future__ import annotations

from rich.console import Console

out, err = Console(), Console(stderr=True)


def coloured(state: str) -> str:
    """A state in its colour, as rich's markup."""
    colour = {"finished": "green", "failed": "red", "running": "cyan", "queued": "cyan"}.get(state, "dim")
    return f"[{colour}]{state}[/]"
