"""What is measured: each operation by name, with its cases. A new kernel is one entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.attention import attention
from bench.case import Case
from bench.loss import loss
from bench.order import order
from bench.pairs import pairs
from bench.plan import plan
from bench.small import small

OPERATIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "plan": plan,
    "attention": attention,
    "loss": loss,
    "small": small,
    "order": order,
    "pairs": pairs,
}
