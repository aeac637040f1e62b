"""Log-likelihoods of many texts at once in packed sequences; what shares a prompt, or a seed, computes it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sbp_kernels import PackedLayout
from torch import Tensor

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.model.transformer import Transformer

PACKED_TOKENS = 8192
SLAB_ROWS = 256  # small enough for the logits of a small vocabulary to stay in a core's cache

Advance = Callable[[int], None]


@dataclass
class Tree:
    """Segments that belong together in one packed sequence, and the predictions to score.

    Attributes:
        segments: token arrays in depth-first order.
        parents: index of each segment's parent among them, -1 for a root.
        rows: int64 [n], index within the tree of the token whose hidden state predicts the target.
        targets: int64 [n], the predicted tokens.
        owners: int64 [n], index of the sum that each prediction's log-probability is added to.
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
    """Size of the forward passes, from which FLOPs are counted."""

    tokens: int
    visible_pairs: int
    predictions: int


def document_trees(documents: Sequence[np.ndarray], context: int) -> list[Tree]:
    """Return one root segment for each chunk of at most `context` tokens of each document.

    Every token after a document's first is predicted once: a chunk starts with the last token that the chunk before predicted.
    """
    trees = []
    for owner, document in enumerate(documents):
        inputs, targets = document[:-1], np.asarray(document[1:], np.int64)
        for start in range(0, len(inputs), context):
            chunk = slice(start, start + context)
            size = len(inputs[chunk])
            trees.append(Tree([inputs[chunk]], [-1], np.arange(size), targets[chunk], np.full(size, owner)))
    return trees


def choice_trees(
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], context: int, where: str = "questions"
) -> list[Tree]:
    """Return a tree for each question: its prompt as the root and each choice as a child.

    The prompt's last token predicts the first token of every choice. If the prompt and the longest choice together exceed the
    context, the prompt is truncated at its beginning. Choices have consecutive owners over all questions.

    Args:
        questions: (prompt tokens, choices' tokens), none of them empty.
        context: longest prompt with a choice, in tokens.
        where: name of the questions in messages.

    Raises:
        UserError: a choice leaves no space for a prompt.
    """
    trees, owner = [], 0
    for number, (prompt, choices) in enumerate(questions, start=1):
        space = context - max(map(len, choices)) + 1  # a choice's last token is predicted, never read
        if space < 1:
            problem = f"a choice is longer than the model's context of {context} tokens"
            raise UserError(f"{where}, question {number}", problem, "shorten it or leave the question out")
        segments, parents = [np.asarray(prompt[-space:], np.int64)], [-1]
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


def pair_trees(
    corpus: Corpus,
    seeds: np.ndarray,
    partners: np.ndarray,
    partner_token: int,
    context: int,
    packed_tokens: int = PACKED_TOKENS,
) -> list[Tree]:
    """Return trees of a seed as the root and its partners as children, in the form that a synthesizer is tuned on.

    As in `PairBatches`: the seed is truncated to `context` tokens, and a partner begins with the partner token in place of its
    first token. Every token of a partner after its first is predicted. Pair i has owner i. A seed with more partners than
    `packed_tokens` hold is repeated.

    Args:
        corpus: the documents.
        seeds: int64 [pairs], indices into the corpus, in any order.
        partners: int64 [pairs], indices into the corpus; none longer than `context`.
        partner_token: the token between seed and partner.
        context: of the model, in tokens.
        packed_tokens: most tokens of a tree; one with a single partner may be longer.
    """
    trees: list[Tree] = []
    order = np.argsort(seeds, kind="stable")
    for pairs in np.split(order, np.flatnonzero(np.diff(seeds[order])) + 1):
        root = corpus[int(seeds[pairs[0]])][:context] if len(pairs) else np.zeros(0, np.int64)
        children: list[tuple[int, np.ndarray]] = []
        length = len(root)
        for pair in pairs.tolist():
            document = corpus[int(partners[pair])].astype(np.int64)
            if children and length + len(document) - 1 > packed_tokens:
                trees.append(_pair_tree(root, children, partner_token))
                children, length = [], len(root)
            children.append((pair, document))
            length += len(document) - 1
        if children:
            trees.append(_pair_tree(root, children, partner_token))
    return trees


def _pair_tree(root: np.ndarray, children: Sequence[tuple[int, np.ndarray]], partner_token: int) -> Tree:
    """Return the tree of a seed with the owners and tokens of its partners."""
    segments = [root, *(np.append(partner_token, document[1:-1]) for _, document in children)]  # the last is only predicted
    targets = [document[1:] for _, document in children]
    owners = [np.full(len(document) - 1, owner) for owner, document in children]
    rows = np.arange(len(root), sum(map(len, segments)))
    return Tree(segments, [-1] + [0] * len(children), rows, np.concatenate(targets), np.concatenate(owners))


@torch.no_grad()
def log_likelihoods(
    model: Transformer, trees: Sequence[Tree], sums: int, *, packed_tokens: int = PACKED_TOKENS, advance: Advance | None = None
) -> tuple[np.ndarray, Extent]:
    """Add the log-probability, in nats, of every prediction to its owner's sum.

    Args:
        model: the model that predicts.
        trees: from `document_trees`, `choice_trees` or `pair_trees`.
        sums: number of owners.
        packed_tokens: most tokens of a packed sequence; a longer tree has one of its own.
        advance: called with the number of tokens of each finished packed sequence.

    Returns:
        The sums, float64 [sums], and the size of the forward passes.
    """
    total = np.zeros(sums)
    tokens = visible_pairs = predictions = 0
    for packed in _packed_sequences(trees, packed_tokens):
        layout = _layout(packed)
        starts = np.cumsum([0, *map(len, packed)])
        rows = np.concatenate([tree.rows + start for tree, start in zip(packed, starts, strict=False)])
        ids = np.concatenate([segment for tree in packed for segment in tree.segments]).astype(np.int64)
        targets, owners = (np.concatenate(parts) for parts in zip(*((t.targets, t.owners) for t in packed), strict=True))
        hidden_TW = model(torch.from_numpy(ids).to(model.device), layout.to(model.device, head_width=model.config.head_dim))
        values = _log_probabilities(model, hidden_TW, torch.from_numpy(rows), torch.from_numpy(targets))
        total += np.bincount(owners, values, sums)
        tokens, visible_pairs, predictions = tokens + len(ids), visible_pairs + layout.visible_pairs(), predictions + len(rows)
        if advance is not None:
            advance(len(ids))
    return total, Extent(tokens, visible_pairs, predictions)


def _packed_sequences(trees: Sequence[Tree], packed_tokens: int) -> Iterator[list[Tree]]:
    packed: list[Tree] = []
    length = 0
    for tree in trees:
        if packed and length + len(tree) > packed_tokens:
            yield packed
            packed, length = [], 0
        packed.append(tree)
        length += len(tree)
    if packed:
        yield packed


def _layout(trees: Sequence[Tree]) -> PackedLayout:
    lengths: list[int] = []
    parents: list[int] = []
    for tree in trees:
        parents += [parent if parent == -1 else parent + len(lengths) for parent in tree.parents]
        lengths += map(len, tree.segments)
    return PackedLayout.from_tree(lengths, parents)


def _log_probabilities(model: Transformer, hidden_TW: Tensor, rows: Tensor, targets: Tensor) -> np.ndarray:
    """Return the targets' log-probabilities, float64 [rows]; logits exist for one slab of rows at a time."""
    values = []
    for slab_rows, slab_targets in zip(rows.split(SLAB_ROWS), targets.split(SLAB_ROWS), strict=True):
        logits_RV = model.logits(hidden_TW[slab_rows.to(hidden_TW.device)])
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        loss = F.cross_entropy(logits_RV, slab_targets.to(logits_RV.device), reduction="none")
        values.append(-loss.double().cpu())
    return torch.cat(values).numpy()
