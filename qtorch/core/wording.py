"""Format numbers together with a noun in singular or plural."""

from __future__ import annotations


def format_count(number: int, singular: str, plural: str | None = None) -> str:
    """Format a count: `1 task`, `2 tasks`, `1,200 tasks`; the default plural appends an s."""
    return f"{number:,} {singular if number == 1 else (plural or f'{singular}s')}"
