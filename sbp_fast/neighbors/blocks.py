"""Work cut into blocks of a fixed size, each done by one thread: the result is the same from any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_blocks(length: int, block: int, work: Callable[[slice], Result], threads: int) -> Iterator[Result]:
    """The results of `work` on `length` things, `block` at a time, in order.

    Matrix products round differently when they are shared out between threads. So a product never is: a block belongs to
    one thread, and how many threads there are decides only which blocks run side by side.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # what the pool's threads inherit
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(work, [slice(start, min(start + block, length)) for start in range(0, length, block)])
    finally:
        torch.set_num_threads(before)
