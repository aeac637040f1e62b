"""The command `show`: the counts of a stage's output and a few of its documents or pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.filters.filtering import REJECTED
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console, duration

CHARACTERS = 600  # of an example's text
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Output:
    """An output to show.

    Attributes:
        directory: of the output.
        corpus: output of `prepare`, which has the texts.
        examples: number of examples.
        dice: chooses them.
    """

    directory: Path
    corpus: PreparedCorpus
    examples: int
    dice: np.random.Generator

    def choose(self, count: int) -> list[int]:
        """Return the indices of the examples among `count` things, in their order."""
        return sorted(self.dice.choice(count, min(count, self.examples), replace=False).tolist())

    def text(self, documents: Corpus, index: int) -> str:
        """Return the beginning of a document's text."""
        text = self.corpus.text(documents, index)
        return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ... ({len(text)} characters)"


def show(directory: Path, *, corpus: Path | None, examples: int, seed: int, console: Console) -> None:
    """Print the counts of a finished output and examples of what it holds.

    Args:
        directory: output of `prepare`, `pair`, `synthesize` or `filter`.
        corpus: output of `prepare` that it was made from; None where it is that output itself.
        examples: number of examples; 0 for none.
        seed: decides which.
        console: where they are printed.

    Raises:
        UserError: not a finished output of one of these stages, or its texts are asked for without a corpus.
    """
    manifest = Manifest.load(directory)
    if manifest.stage not in SHOWN:
        known = f"it shows outputs of {', '.join(SHOWN)}"
        raise UserError(directory, f"is the output of {manifest.stage}", f"give another one: {known}")
    console.say(f"{directory}: {manifest.stage}, {duration(manifest.seconds)}")
    for name, value in manifest.counts.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            console.say(f"  {name.replace('_', ' ')}: {f'{value:,}' if isinstance(value, int) else f'{value:.4g}'}")
    if not examples:
        return
    prepared = _corpus_of(directory, manifest, corpus)
    for line in SHOWN[manifest.stage](Output(directory, prepared, examples, np.random.default_rng(seed))):
        for part in line.splitlines() or [""]:
            console.say(part)


def _corpus_of(directory: Path, manifest: Manifest, corpus: Path | None) -> PreparedCorpus:
    """Return the prepared corpus whose documents an output names by their numbers."""
    if manifest.stage == "prepare":
        corpus = corpus or directory
    elif corpus is None:
        raise UserError(directory, "has token ids and no texts", "give --corpus, the output of prepare, or --examples 0")
    expected = manifest.fingerprint if manifest.stage == "prepare" else manifest.inputs["corpus"]
    if Manifest.load(corpus, "prepare").fingerprint != expected:
        raise UserError(corpus, f"is not the corpus of {directory}", "give the output of prepare that it was made from")
    return PreparedCorpus(corpus)


def _documents(output: Output) -> Iterator[str]:
    """Yield the sources and examples of the unique documents of a prepared corpus."""
    unique = output.corpus.unique
    lengths = np.diff(unique.offsets)
    values = zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)
    yield f"tokens of a unique document, quantiles: {', '.join(f'{share:.0%} {value:.0f}' for share, value in values)}"
    for index in output.choose(len(unique)):
        yield f"--- {unique.ids[index]}, {lengths[index]} tokens"
        yield output.text(unique, index)


def _pairs(output: Output) -> Iterator[str]:
    """Yield examples of pairs."""
    pairs, unique = PairSet(output.directory), output.corpus.unique
    for index in output.choose(len(pairs)):
        seed, partner = int(pairs.seeds[index]), int(pairs.partners[index])
        yield f"--- similarity {pairs.scores[index]:.3f}: {unique.ids[seed]}"
        yield output.text(unique, seed)
        yield f"    with {unique.ids[partner]}"
        yield output.text(unique, partner)


def _synthetic(output: Output) -> Iterator[str]:
    """Yield examples of synthetic documents, with their seeds."""
    documents, unique = Corpus(output.directory), output.corpus.unique
    seeds = documents.column("seed")
    for index in output.choose(len(documents)):
        seed = int(seeds[index])
        yield f"--- {documents.ids[index]}, after {'no seed' if seed < 0 else unique.ids[seed]}"
        yield output.text(documents, index)


def _filtered(output: Output) -> Iterator[str]:
    """Yield how many documents each rule rejected, and examples of those that stay."""
    reasons = pq.read_table(output.directory / REJECTED)["reason"]
    rejected = sorted(reasons.value_counts().to_pylist(), key=lambda entry: -entry["counts"])
    shares = ", ".join(f"{entry['values'].replace('_', ' ')} {entry['counts']}" for entry in rejected)
    yield f"rejected: {len(reasons)}" + (f" ({shares})" if rejected else "")
    yield from _synthetic(output)


SHOWN: dict[str, Callable[[Output], Iterator[str]]] = {
    "prepare": _documents,
    "pair": _pairs,
    "synthesize": _synthetic,
    "filter": _filtered,
}
"""Stage -> function that yields the lines on examples of its output."""
