"""Mapping a function over parts of the data in threads, each with one torch thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_threads(function: Callable[[T], R], parts: Iterable[T], num_threads: int) -> list[R]:
    """Return `function(part)` of each part; the first error cancels the parts that wait.

    Every call runs in a pool's thread, even with `num_threads` 1: torch's number of threads is set
    by thread, and that of the caller must not change.
    """
    previous = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            num_threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return list(pool.map(function, parts))
    finally:
        torch.set_num_threads(previous)
