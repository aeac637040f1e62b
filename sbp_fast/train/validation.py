"""The held-out loss of a model at evenly spaced points of its training, and the choice of weights by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.distributed import Processes
from sbp_fast.train.data.validation_sets import ValidationSet
from sbp_fast.train.sharding import gathered, reshard

History = Sequence[tuple[int, float | None]]
"""(steps done, held-out loss in nats a token) of each point so far; a loss is None where it was not finite."""


@dataclass(frozen=True)
class Validation:
    """What is measured at each point; it reads no random numbers of the training and changes no weights.

    Attributes:
        points: number of points in a run.
        measured: the sequences whose loss is measured; None measures nothing.
        write_samples: maps a model, whose weights are whole, to a record for each of a few generated texts; None writes none.
    """

    points: int
    measured: ValidationSet | None = None
    write_samples: Callable[[Transformer], list[dict[str, Any]]] | None = None

    def steps(self, total: int) -> frozenset[int]:
        """Return after how many of `total` steps the points are, the last after all of them."""
        return frozenset(math.ceil(point * total / self.points) for point in range(1, self.points + 1))

    @torch.no_grad()
    def loss(self, model: Transformer, processes: Processes, attention: str) -> float | None:
        """Return the mean loss over the measured tokens in nats, the same on every process; None if it is not finite.

        All processes call this together and run equally many forward passes, as sharded weights need: those without a
        sequence of their own repeat one, and leave its loss out.
        """
        assert self.measured is not None
        sequences, rank, world = self.measured.sequences, processes.rank, processes.world
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for index in range(rank, rank + -(-len(sequences) // world) * world, world):
            sequence = sequences[index % len(sequences)].to(processes.device)
            loss = model(sequence.tokens, sequence.layout, sequence.targets, sequence.loss_rows, attention)
            if index < len(sequences):
                total += loss
        reshard(model)
        (nats,) = processes.sum(float(total))
        mean = processes.broadcast(nats / self.measured.loss_tokens)
        return mean if math.isfinite(mean) else None

    def metrics(self, loss: float | None) -> dict[str, float | None]:
        """Return the figures of a point for metrics.jsonl.

        Bits per byte are the loss of all tokens, the end of each text included, over the UTF-8 bytes of the texts.
        """
        assert self.measured is not None
        nats_per_byte = None if loss is None else loss * self.measured.loss_tokens / self.measured.text_bytes
        return {
            "validation/loss": loss,
            "validation/bits_per_byte": None if nats_per_byte is None else nats_per_byte / math.log(2),
        }

    def samples(self, model: Transformer, processes: Processes) -> list[dict[str, Any]]:
        """Return the records of the generated texts on rank 0, nothing on other processes; all call this together."""
        if self.write_samples is None:
            return []
        with gathered(model):
            return self.write_samples(model) if processes.is_rank0 else []


def best_point(history: History) -> tuple[int, float] | None:
    """Return (steps done, loss) of the point with the lowest loss, of equal ones the first; None if no loss was finite."""
    finite = [(steps, loss) for steps, loss in history if loss is not None]
    return min(finite, key=lambda point: point[1]) if finite else None


def points_since_best(history: History) -> int:
    """Return the number of points after the one with the lowest loss; of all points if no loss was finite."""
    best = best_point(history)
    return len([steps for steps, _ in history if best is None or steps > best[0]])
