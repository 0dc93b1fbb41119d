"""Numbers of things, said as English says them."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 task`, `2 tasks`, `1,200 tasks`: the number and the words that go with it; `many` is
    `one` with an s by default."""
    return f"{number:,} {one if number == 1 else (many or f'{one}s')}"
