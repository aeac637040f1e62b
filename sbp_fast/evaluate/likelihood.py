"""Log-likelihoods of many sequences at once, packed into streams; choices that share a prompt compute it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sbp_kernels import PackedLayout
from torch import Tensor

from sbp_fast.errors import UserError
from sbp_fast.model.transformer import Transformer

STREAM_TOKENS = 8192
SLAB_ROWS = 256  # small enough for the logits of a small vocabulary to stay in a core's cache

Advance = Callable[[int], None]


@dataclass
class Tree:
    """Segments that belong together in one stream, and the predictions asked of them.

    Attributes:
        segments: token arrays in depth-first order.
        parents: index of each segment's parent among them, -1 for a root.
        rows: int64 [n], the token of the tree (counted from its first) whose hidden state predicts `targets`.
        targets: int64 [n].
        owners: int64 [n], the sum that each prediction's log-probability goes to.
    """

    segments: list[np.ndarray]
    parents: list[int]
    rows: np.ndarray
    targets: np.ndarray
    owners: np.ndarray

    def __len__(self) -> int:
        return sum(map(len, self.segments))


@dataclass(frozen=True)
class Extent:
    """How much a forward pass computes: what FLOPs are counted from."""

    tokens: int
    visible_pairs: int
    predictions: int


def document_trees(documents: Sequence[np.ndarray], context: int) -> list[Tree]:
    """One root segment for each piece of at most `context` tokens; every token after a document's first is predicted once.

    A piece starts with the last token that the piece before predicted, so that nothing is left out between the two.
    """
    trees = []
    for owner, document in enumerate(documents):
        inputs, targets = document[:-1], np.asarray(document[1:], np.int64)
        for start in range(0, len(inputs), context):
            piece = slice(start, start + context)
            size = len(inputs[piece])
            trees.append(Tree([inputs[piece]], [-1], np.arange(size), targets[piece], np.full(size, owner)))
    return trees


def choice_trees(
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], context: int, where: str = "questions"
) -> list[Tree]:
    """The prompt as the root and each choice as its child; sums are numbered through, question after question.

    The prompt's last token predicts the first token of every choice. A prompt too long for the context beside its longest
    choice loses its beginning.

    Args:
        questions: (prompt tokens, choices' tokens), none of them empty.
        where: what the questions are called in messages.

    Raises:
        UserError: a choice that leaves no room for a prompt.
    """
    trees, owner = [], 0
    for number, (prompt, choices) in enumerate(questions, start=1):
        room = context - max(map(len, choices)) + 1  # a choice's last token is predicted, never read
        if room < 1:
            what = f"a choice is longer than the model's context of {context} tokens"
            raise UserError(f"{where}, question {number}", what, "shorten it or leave the question out")
        segments, parents = [np.asarray(prompt[-room:], np.int64)], [-1]
        rows, targets, owners = [], [], []
        for choice in choices:
            tokens, start = np.asarray(choice, np.int64), sum(map(len, segments))
            rows += [len(segments[0]) - 1, *range(start, start + len(tokens) - 1)]
            targets.append(tokens)
            owners.append(np.full(len(tokens), owner))
            if len(tokens) > 1:
                segments.append(tokens[:-1])
                parents.append(0)
            owner += 1
        trees.append(Tree(segments, parents, np.array(rows), np.concatenate(targets), np.concatenate(owners)))
    return trees


@torch.no_grad()
def log_likelihoods(
    model: Transformer, trees: Sequence[Tree], sums: int, *, stream_tokens: int = STREAM_TOKENS, advance: Advance | None = None
) -> tuple[np.ndarray, Extent]:
    """Add the log-probability, in nats, of every prediction to its owner's sum.

    Args:
        trees: from `document_trees` or `choice_trees`.
        sums: how many owners there are.
        stream_tokens: trees are packed into streams of at most so many tokens (a longer tree has its own).
        advance: told the tokens of each finished stream.

    Returns:
        float64 [sums], and what was computed for them.
    """
    total = np.zeros(sums)
    tokens = visible_pairs = predictions = 0
    for stream in _streams(trees, stream_tokens):
        layout = _layout(stream)
        starts = np.cumsum([0, *map(len, stream)])
        rows = np.concatenate([tree.rows + start for tree, start in zip(stream, starts, strict=False)])
        ids = np.concatenate([segment for tree in stream for segment in tree.segments]).astype(np.int64)
        targets, owners = (np.concatenate(parts) for parts in zip(*((t.targets, t.owners) for t in stream), strict=True))
        hidden_TW = model(torch.from_numpy(ids).to(model.device), layout.to(model.device))
        values = _log_probabilities(model, hidden_TW, torch.from_numpy(rows), torch.from_numpy(targets))
        total += np.bincount(owners, values, sums)
        tokens, visible_pairs, predictions = tokens + len(ids), visible_pairs + layout.visible_pairs(), predictions + len(rows)
        if advance is not None:
            advance(len(ids))
    return total, Extent(tokens, visible_pairs, predictions)


def _streams(trees: Sequence[Tree], stream_tokens: int) -> Iterator[list[Tree]]:
    stream: list[Tree] = []
    held = 0
    for tree in trees:
        if stream and held + len(tree) > stream_tokens:
            yield stream
            stream, held = [], 0
        stream.append(tree)
        held += len(tree)
    if stream:
        yield stream


def _layout(stream: Sequence[Tree]) -> PackedLayout:
    lengths: list[int] = []
    parents: list[int] = []
    for tree in stream:
        parents += [parent if parent == -1 else parent + len(lengths) for parent in tree.parents]
        lengths += map(len, tree.segments)
    return PackedLayout.from_tree(lengths, parents)


def _log_probabilities(model: Transformer, hidden_TW: Tensor, rows: Tensor, targets: Tensor) -> np.ndarray:
    """float64 [rows]; logits exist for one slab of rows at a time."""
    values = []
    for slab_rows, slab_targets in zip(rows.split(SLAB_ROWS), targets.split(SLAB_ROWS), strict=True):
        logits_RV = model.logits(hidden_TW[slab_rows.to(hidden_TW.device)])
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        loss = F.cross_entropy(logits_RV, slab_targets.to(logits_RV.device), reduction="none")
        values.append(-loss.double().cpu())
    return torch.cat(values).numpy()
