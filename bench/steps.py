"""A whole training step on a CPU, in tokens with a loss a second: what shared seeds and packed documents save.

Seeds with several partners are packed once, or repeated for each partner. Documents are packed, or stand in padded batches as
most code for transformers' models has them, or go through transformers' own packed form, in which positions that begin again
mark documents. All variants have the same weights, AdamW, and the same documents; compiled ones are compiled whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.case import Case, Prepared, Provider, Schedule, Tensors, no_inputs, no_results
from bench.length_distributions import SegmentTree, documents
from bench.training import as_pairs
from sbp_fast.config import ModelConfig, TrainConfig
from sbp_fast.config.files import load_config
from sbp_fast.model.flops import training_flops
from sbp_fast.model.huggingface import hugging_face_config, to_hugging_face
from sbp_fast.model.transformer import Transformer
from sbp_fast.train.data.batches import NO_TARGET, Counts, PackedBatch
from sbp_fast.train.loop import train_step
from sbp_fast.train.optimizer import make_optimizers

MODELS = {"demo": ("demo", 2048), "30M": ("mini", 4096)}
"""Name -> configuration whose model it is, and tokens of a packed sequence."""
PARTNERS = (1, 2, 4, 8)
PADDED_BATCH = 8  # documents of a padded batch
LENGTHS, DOCUMENT = "32 to 224", 128
RATE = 1e-4
SCHEDULE = Schedule(rounds=7, min_rounds=3, warm_up=1, seconds=240.0)
LossOfStep = Callable[[], Tensor]


class Documents(NamedTuple):
    """Packed documents, or seeds with partners, and the tokens in them that carry a loss.

    Attributes:
        tree: lengths and parents of the segments.
        tokens: int64 [T].
        targets: int64 [T], the token that follows, or NO_TARGET.
    """

    tree: SegmentTree
    tokens: np.ndarray
    targets: np.ndarray

    @property
    def packed(self) -> PackedBatch:
        """One packed sequence with all of them."""
        lengths, parents = self.tree
        tree = parents if any(parent >= 0 for parent in parents) else None
        return PackedBatch.build(self.tokens, self.targets, lengths, length=len(self.tokens), parents=tree)

    @property
    def parts(self) -> list[slice]:
        """The rows of each segment."""
        ends = np.cumsum(self.tree[0])
        return [slice(int(end) - length, int(end)) for length, end in zip(self.tree[0], ends, strict=True)]


def steps() -> Iterator[Case]:
    """Return shared seeds at several numbers of partners, then documents, for each model; none where there is a GPU."""
    if torch.cuda.is_available():
        return
    for name, (configuration, tokens) in MODELS.items():
        config = load_config([configuration])
        model, vocabulary = config.model, config.corpus.vocabulary_size
        for partners in PARTNERS:
            yield _seeds_case(name, model, vocabulary, partners, tokens)
        yield _documents_case(name, model, vocabulary, tokens)


def whole_trees(partners: int, tokens: int) -> SegmentTree:
    """Return as many seeds with `partners` partners each as `tokens` hold whole, all documents of one length."""
    seeds, group = tokens // (DOCUMENT * (partners + 1)), partners + 1
    parents = [-1 if member == 0 else seed * group for seed in range(seeds) for member in range(group)]
    return [DOCUMENT] * len(parents), parents


def make_documents(tree: SegmentTree, vocabulary: int) -> Documents:
    """Return random tokens in the segments; where some have parents, only they carry loss."""
    lengths, parents = tree
    tokens = np.random.default_rng(0).integers(3, vocabulary, sum(lengths))
    targets = np.append(tokens[1:], NO_TARGET)
    made = Documents(tree, tokens, targets)
    for rows, parent in zip(made.parts, parents, strict=True):
        targets[rows.stop - 1] = NO_TARGET
        if parent < 0 and any(other >= 0 for other in parents):
            targets[rows] = NO_TARGET
    return made


def _seeds_case(name: str, model: ModelConfig, vocabulary: int, partners: int, tokens: int) -> Case:
    tree = whole_trees(partners, tokens)
    shared = make_documents(tree, vocabulary)
    repeated = make_documents(as_pairs(tree, 2 * len(tree[0]) * DOCUMENT), vocabulary)
    work = [_flops(model, vocabulary, made.packed.counts) for made in (shared, repeated)]
    return Case(
        {"step of": name, "partners a seed": partners, "tokens": tokens},
        no_inputs,
        {
            "ours": partial(_ours, model, vocabulary, shared),
            "ours, seeds repeated": partial(_ours, model, vocabulary, repeated),
        },
        None,
        work=float(shared.packed.counts.loss_tokens),
        unit="loss tokens",
        flops=work[0] * shared.packed.counts.loss_tokens,
        statistics={"counted speed-up": work[1] / work[0]},
        clock=time.perf_counter,
        schedule=SCHEDULE,
    )


def _flops(model: ModelConfig, vocabulary: int, counts: Counts) -> float:
    """Return the arithmetic for each token with a loss."""
    return training_flops(model, vocabulary, counts.tokens, counts.visible_pairs, counts.loss_tokens) / counts.loss_tokens


def _documents_case(name: str, model: ModelConfig, vocabulary: int, tokens: int) -> Case:
    made = make_documents(documents(LENGTHS, tokens), vocabulary)
    theirs = partial(_transformers, model, vocabulary, made)
    providers: dict[str, Provider] = {
        "ours": partial(_ours, model, vocabulary, made),
        "transformers, padded batches": partial(theirs, padded_batches),
        "transformers, packed": partial(theirs, packed_batch),
        "transformers, padded batches, compiled": partial(theirs, padded_batches, compiled=True),
        "transformers, packed, compiled": partial(theirs, packed_batch, compiled=True),
    }
    counts = made.packed.counts
    return Case(
        {"step of": name, "lengths": LENGTHS, "tokens": tokens},
        no_inputs,
        providers,
        None,
        work=float(counts.loss_tokens),
        unit="loss tokens",
        flops=_flops(model, vocabulary, counts) * counts.loss_tokens,
        verify=partial(_verify, model, vocabulary, made),
        clock=time.perf_counter,
        schedule=SCHEDULE,
    )


def _model(shape: ModelConfig, vocabulary: int) -> Transformer:
    model = Transformer(shape, vocabulary)
    model.initialize(0)
    return model


def _ours(shape: ModelConfig, vocabulary: int, made: Documents, _: Tensors) -> Prepared:
    """A step of the product, the packing of its sequence included."""
    model, size = _model(shape, vocabulary), len(made.tokens)
    recipe = TrainConfig(tokens_per_step=size, microbatch_tokens=size, optimizer="adamw")
    optimizers = make_optimizers(model, recipe)

    def step() -> Counts:
        _, _, counts = train_step(model, iter([made.packed]), 1, optimizers, recipe, RATE)
        return counts

    return Prepared(step, results=no_results, work=lambda counts: float(counts.loss_tokens))


def their_model(shape: ModelConfig, vocabulary: int) -> Any:
    """Return transformers' model of the same shape and weights."""
    import transformers

    content = hugging_face_config(shape, vocabulary, positions=2 * shape.context, where=Path("bench"))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**content), dtype=torch.float32)
    model.load_state_dict(to_hugging_face(_model(shape, vocabulary)), strict=not shape.tied_embeddings)
    return model


def padded_batches(made: Documents) -> list[dict[str, Tensor]]:
    """Return the documents in batches of `PADDED_BATCH`, each as long as its longest, in the order that they have."""
    batches = []
    for first in range(0, len(made.parts), PADDED_BATCH):
        parts = made.parts[first : first + PADDED_BATCH]
        longest = max(rows.stop - rows.start for rows in parts)
        ids, labels = torch.zeros(len(parts), longest, dtype=torch.int64), torch.full((len(parts), longest), NO_TARGET)
        mask = torch.zeros(len(parts), longest, dtype=torch.int64)
        for row, part in enumerate(parts):
            length = part.stop - part.start
            ids[row, :length] = labels[row, :length] = torch.from_numpy(made.tokens[part])
            mask[row, :length] = 1
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def packed_batch(made: Documents) -> list[dict[str, Tensor]]:
    """Return the documents in one row whose positions begin again with each; a first token is no label."""
    labels = made.tokens.copy()
    labels[[rows.start for rows in made.parts]] = NO_TARGET
    positions = np.concatenate([np.arange(rows.stop - rows.start) for rows in made.parts])
    row = {"input_ids": made.tokens, "position_ids": positions, "labels": labels}
    return [{name: torch.from_numpy(values)[None] for name, values in row.items()}]


def their_loss(model: Any, batch: dict[str, Tensor], loss_tokens: int) -> Tensor:
    """Return the summed loss of a batch over the number of tokens with a loss in the whole step."""
    loss: Tensor = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(loss_tokens)).loss
    return loss


def _transformers(
    shape: ModelConfig,
    vocabulary: int,
    made: Documents,
    make: Callable[[Documents], list[dict[str, Tensor]]],
    _: Tensors,
    compiled: bool = False,
) -> Prepared:
    """A step as a trainer for transformers' models takes it, the making of its batches included."""
    model, loss_tokens = their_model(shape, vocabulary), made.packed.counts.loss_tokens
    forward = torch.compile(model, dynamic=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        for batch in make(made):
            their_loss(forward, batch, loss_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Prepared(step, results=no_results)


def _verify(shape: ModelConfig, vocabulary: int, made: Documents) -> dict[str, Any]:
    """Compare the loss of every form with ours, on weights in float64; transformers computes the loss itself in float32."""
    batch, loss_tokens = made.packed, made.packed.counts.loss_tokens
    exact = _model(shape, vocabulary).double()(batch.tokens, batch.layout, batch.targets, batch.loss_rows) / loss_tokens
    model = their_model(shape, vocabulary).double()
    losses = {
        form.__name__: sum(their_loss(model, batch, loss_tokens).item() for batch in form(made))
        for form in (padded_batches, packed_batch)
    }
    errors = {name: {"loss": abs(loss / exact.item() - 1)} for name, loss in losses.items()}
    return {"right": max(error["loss"] for error in errors.values()) < 1e-6, "errors": errors}
