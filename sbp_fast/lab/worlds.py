"""Worlds with known truth: corpora of short documents about concepts, of which every entropy is exact.

A concept has eight facts, each with one of a few values. A document tells four of them under a name of two letters; each told
value is replaced by a random one with probability `noise`. The genres A1 and A2 tell the first four facts, B1 and B2 the last
four, and J1 the last four under the name that A writes. A J1 document is among the unique documents only where its concept is
*linked*; the lab asks for the J1 documents of the other concepts.

In the world `two-names`, A and J1 write a name in lower-case letters, and B writes it in upper-case letters that follow from
these by a rule, letter by letter, which no document states. Only the relation between documents that tell the same facts then
shows what J1 says of an unlinked concept. In `shared-name` all genres write the same name, and single documents show it too.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

Kind: TypeAlias = Literal["two-names", "shared-name"]
GENRES = ("A1", "A2", "B1", "B2", "J1")
JOINED = GENRES.index("J1")
FACTS = 4
"""Facts that a document tells: the first or the last of its concept's."""
LETTERS = 24
WORDS = 1 + 2 + FACTS
"""Words of a document: genre, name, values."""


@dataclass(frozen=True)
class WorldSettings:
    """What a world depends on.

    Attributes:
        kind: whether B writes a name of its own, or the name that A writes.
        concepts: their number.
        values: that a fact may have.
        linked: share of the concepts with a J1 document among the unique ones.
        noise: probability that a told value is replaced by a random one, perhaps by the same.
        oracle_ratio: documents that the oracle may read beside the unique ones, for each of these.
        heldout_documents: held-out documents of each concept in each of the genres B1 and J1.
        seed: of everything random.
    """

    kind: Kind = "two-names"
    concepts: int = 256
    values: int = 8
    linked: float = 0.6
    noise: float = 0.05
    oracle_ratio: int = 20
    heldout_documents: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Documents:
    """Documents of a world as numbers.

    Attributes:
        concepts: int64 [documents]; -1 where a name belongs to no concept.
        genres: int64 [documents], indices into `GENRES`.
        values: int64 [documents, FACTS], the told values.
    """

    concepts: np.ndarray
    genres: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.concepts)


class World:
    """A world: the truth about its concepts, and documents that tell it.

    Attributes:
        names: int64 [concepts, 2], letters that A and J1 write.
        rule: int64 [LETTERS], the letter that B writes in place of each.
        truth: int64 [concepts, 2 * FACTS].
        linked: bool [concepts].
    """

    def __init__(self, settings: WorldSettings) -> None:
        self.settings = settings
        random = np.random.default_rng([settings.seed, 0])
        codes = random.permutation(LETTERS * LETTERS)[: settings.concepts]
        self.names = np.stack(np.divmod(codes, LETTERS), axis=1)
        self.rule = random.permutation(LETTERS)
        self.truth = random.integers(settings.values, size=(settings.concepts, 2 * FACTS))
        self.linked = np.zeros(settings.concepts, bool)
        self.linked[random.permutation(settings.concepts)[: round(settings.linked * settings.concepts)]] = True

    @cached_property
    def unique(self) -> Documents:
        """One document of each concept in each genre, J1 of the linked concepts alone."""
        concepts = np.arange(self.settings.concepts)
        chosen = [*[concepts] * JOINED, concepts[self.linked]]
        genres = np.repeat(np.arange(len(GENRES)), [len(part) for part in chosen])
        return self._tell(np.concatenate(chosen), genres, stream=1)

    @cached_property
    def others(self) -> Documents:
        """Documents that the oracle alone may read: of random concepts, linked or not, in random genres."""
        random = np.random.default_rng([self.settings.seed, 2])
        count = self.settings.oracle_ratio * len(self.unique)
        concepts, genres = random.integers(self.settings.concepts, size=count), random.integers(len(GENRES), size=count)
        return self._tell(concepts, genres, stream=3)

    @cached_property
    def heldout(self) -> Documents:
        """B1 and J1 documents of all concepts, so that pairs of held-out documents ask how J1 is written after B."""
        concepts = np.repeat(np.arange(self.settings.concepts), self.settings.heldout_documents)
        genres = np.repeat([GENRES.index("B1"), JOINED], len(concepts))
        return self._tell(np.tile(concepts, 2), genres, stream=4)

    def related_pairs(self, documents: Documents) -> np.ndarray:
        """Return all ordered pairs of different documents that tell the same facts of one concept; int64 [pairs, 2], sorted."""
        key = 2 * documents.concepts + _tells_last_facts(documents.genres)
        order = np.argsort(key, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(key[order])) + 1)
        pairs = [(first, second) for group in groups for first in group for second in group if first != second]
        return np.array(sorted(pairs), np.int64).reshape(-1, 2)

    def facts(self, documents: Documents) -> np.ndarray:
        """Return the true values of the facts that each document tells; int64 [documents, FACTS]."""
        truth = self.truth[documents.concepts].reshape(-1, 2, FACTS)
        return truth[np.arange(len(documents)), _tells_last_facts(documents.genres).astype(int)]

    def _tell(self, concepts: np.ndarray, genres: np.ndarray, stream: int) -> Documents:
        random = np.random.default_rng([self.settings.seed, stream])
        facts = self.facts(Documents(concepts, genres, np.zeros((len(concepts), FACTS), np.int64)))
        replaced = random.random(facts.shape) < self.settings.noise
        return Documents(concepts, genres, np.where(replaced, random.integers(self.settings.values, size=facts.shape), facts))

    # --- text

    @property
    def vocabulary(self) -> list[str]:
        """Every word, each of which is one token."""
        values = [str(value) for value in range(self.settings.values)]
        return [*GENRES, *string.ascii_lowercase[:LETTERS], *string.ascii_uppercase[:LETTERS], *values]

    def texts(self, documents: Documents) -> list[str]:
        """Return the text of each document, such as "B1 K F 3 0 5 5"."""
        return [
            " ".join([GENRES[genre], *self._name(concept, genre), *map(str, values)])
            for concept, genre, values in zip(
                documents.concepts.tolist(), documents.genres.tolist(), documents.values.tolist(), strict=True
            )
        ]

    def _name(self, concept: int, genre: int) -> str:
        letters = self.names[concept]
        if self._writes_other_name(genre):
            return "".join(string.ascii_uppercase[letter] for letter in self.rule[letters])
        return "".join(string.ascii_lowercase[letter] for letter in letters)

    def _writes_other_name(self, genre: int) -> bool:
        return self.settings.kind == "two-names" and GENRES[genre].startswith("B")

    @cached_property
    def _concepts_by_name(self) -> dict[tuple[str, bool], int]:
        sides = {self._writes_other_name(genre): genre for genre in range(len(GENRES))}
        return {
            (self._name(concept, genre), side): concept for side, genre in sides.items() for concept in range(len(self.names))
        }

    def read(self, texts: Sequence[str]) -> tuple[Documents, np.ndarray]:
        """Return what texts tell, and which of them are well-formed documents; bool [texts].

        A text that is not well-formed is a document of concept -1, genre 0 and values 0.
        """
        rows = [self._read(text.split(" ")) for text in texts]
        concepts, genres = (np.array([0 if row is None else row[column] for row in rows], np.int64) for column in (0, 1))
        values = np.array([[0] * FACTS if row is None else row[2] for row in rows], np.int64).reshape(-1, FACTS)
        well_formed = np.array([row is not None for row in rows], bool)
        return Documents(np.where(well_formed, concepts, -1), genres, values), well_formed

    def _read(self, words: list[str]) -> tuple[int, int, list[int]] | None:
        values = [str(value) for value in range(self.settings.values)]
        if len(words) != WORDS or words[0] not in GENRES or any(word not in values for word in words[3:]):
            return None
        genre, letters = GENRES.index(words[0]), string.ascii_letters
        if any(word not in letters for word in words[1:3]):
            return None
        concept = self._concepts_by_name.get(("".join(words[1:3]), self._writes_other_name(genre)), -1)
        return concept, genre, [int(word) for word in words[3:]]

    # --- exact bounds

    @property
    def entropy(self) -> float:
        """Nats of a told value to one who knows the truth: the noise."""
        return _cross_entropy(self._told(0), self._told(0))

    @property
    def uniform(self) -> float:
        """Nats of a told value to one who knows nothing."""
        return math.log(self.settings.values)

    def probabilities(self, documents: Documents) -> np.ndarray:
        """Return the probability of each told value to one who knows the truth; float64 [documents, FACTS]."""
        return np.where(documents.values == self.facts(documents), self._told(0)[0], self._told(0)[1])

    def predictive(self, told: np.ndarray) -> np.ndarray:
        """Return the posterior predictive distribution of a fact's next telling.

        The prior of the truth is uniform, and tellings are independent given it: p(next | told) = sum over truths of
        p(truth | told) p(next | truth).

        Args:
            told: int64 [facts, tellings], earlier tellings of each fact.

        Returns:
            float64 [facts, values].
        """
        values = self.settings.values
        likelihood = np.stack([self._told(truth) for truth in range(values)])  # [truth, told]
        posterior = np.ones((len(told), values))
        for telling in told.T:
            posterior *= likelihood[:, telling].T
        return posterior / posterior.sum(1, keepdims=True) @ likelihood

    def expected_loss(self, tellings: int) -> float:
        """Nats of a told value to one who was told the fact so many times: the exact expectation over all tellings."""
        values = self.settings.values
        told = np.indices([values] * tellings).reshape(tellings, values**tellings).T
        truth = self._told(0)  # by symmetry any truth has this loss
        weights = truth[told].prod(1)
        possible = weights > 0  # without noise, tellings that contradict each other are not
        losses = [_cross_entropy(truth, predicted) for predicted in self.predictive(told[possible])]
        return float(weights[possible] @ losses)

    def _told(self, truth: int) -> np.ndarray:
        """Return the probability of each told value; float64 [values]."""
        noise, values = self.settings.noise, self.settings.values
        return np.where(np.arange(values) == truth, 1 - noise + noise / values, noise / values)


def _tells_last_facts(genres: np.ndarray) -> np.ndarray:
    return genres >= GENRES.index("B1")


def _cross_entropy(truth: np.ndarray, predicted: np.ndarray) -> float:
    positive = truth > 0
    return float(-(truth[positive] * np.log(predicted[positive])).sum())
