"""Fitting a model that was made elsewhere to the tokens of its tokenizer here: one row of its tables for each token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.errors import UserError
from sbp_fast.model.transformer import Transformer

MEAN = "mean"
"""Name of the initialisation of new rows: the mean of the rows of known tokens (Hewitt, 2021, "Initializing New Word Embeddings
for Pretrained Language Models"), with which a new token is about as probable as any other."""


@dataclass(frozen=True)
class FittedVocabulary:
    """What became of the rows of a model's tables.

    Attributes:
        rows: of the model as it was.
        tokens: ids of the tokenizer, and rows of the model now.
        new: tokens that had no row of their own.
    """

    rows: int
    tokens: int
    new: tuple[str, ...]

    @property
    def unused(self) -> int:
        """Number of rows that were left out, since no token has them: padding."""
        return max(self.rows - self.tokens, 0)

    def describe(self) -> list[str]:
        """Return lines about new and unused rows, none where the tables fitted."""
        lines = [f"{self.unused} rows of the embeddings left out, which no token has"] * bool(self.unused)
        if self.new:
            names = ", ".join(self.new)
            lines.append(f"{len(self.new)} tokens that the model does not know begin as the {MEAN} of the others: {names}")
        return lines


def fit_vocabulary(model: Transformer, tokenizer: Tokenizer, where: Path) -> FittedVocabulary:
    """Give a model one row for each id of its tokenizer, which may have new special tokens.

    Rows that no id has, such as those that pad a table to a round size, are left out. The rows of tokens that are new to the
    model, and of added tokens that its tables are too short for, become the mean of the others.

    Args:
        model: changed in place, in float32 on the CPU.
        tokenizer: of the model, with the special tokens of this project.
        where: names the model in messages.

    Raises:
        UserError: the tables are too short for the tokenizer's own vocabulary, so that it is another model's.
    """
    rows, vocabulary = model.vocabulary_size, tokenizer.vocabulary()
    if tokenizer.own_size > rows:
        problem = f"has {rows} rows of embeddings, and its tokenizer.json {tokenizer.own_size} tokens"
        raise UserError(where, problem, "give the tokenizer.json of this model")
    new = {token: id for token, id in vocabulary.items() if id >= rows or token in tokenizer.new_tokens}
    fitted = FittedVocabulary(rows, tokenizer.vocabulary_size, tuple(sorted(new, key=lambda token: new[token])))
    if fitted.new or fitted.unused:
        ids = sorted(new.values())
        model.embed_tokens.weight = nn.Parameter(_fit(model.embed_tokens.weight.data, fitted.tokens, ids))
        model.embed_tokens.num_embeddings = model.vocabulary_size = fitted.tokens
        if model.lm_head is not None:
            model.lm_head.weight = nn.Parameter(_fit(model.lm_head.weight.data, fitted.tokens, ids))
            model.lm_head.out_features = fitted.tokens
    return fitted


def _fit(table: Tensor, size: int, new: list[int]) -> Tensor:
    """Return a table [size, width] whose rows `new` are the mean of those of the given table that it keeps."""
    kept = min(len(table), size)
    known = torch.ones(kept, dtype=torch.bool)
    known[[id for id in new if id < kept]] = False
    mean = table[:kept][known].double().mean(0).to(table.dtype)
    fitted = mean.expand(size, -1).clone()
    fitted[:kept][known] = table[:kept][known]
    return fitted
