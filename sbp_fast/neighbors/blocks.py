"""Work in blocks of a fixed size, one thread a block, so that results do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def map_blocks(length: int, block: int, function: Callable[[slice], Result], threads: int) -> Iterator[Result]:
    """Yield the results of `function` on `length` rows, `block` rows at a time, in order.

    A matrix product rounds differently when several threads share it. Here one thread computes all of a block, and the
    number of threads only decides which blocks run side by side.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # the pool's threads inherit this
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, [slice(start, min(start + block, length)) for start in range(0, length, block)])
    finally:
        torch.set_num_threads(threads_before)
