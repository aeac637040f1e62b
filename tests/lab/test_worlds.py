"""Worlds with known truth: documents, texts, pairs and exact bounds."""

import math

import numpy as np
import pytest

from sbp_fast.lab.worlds import FACTS, GENRES, JOINED, Documents, World, WorldSettings

SMALL = {"concepts": 24, "oracle_ratio": 3}


def world(**settings: object) -> World:
    return World(WorldSettings(**(SMALL | settings)))


def test_unique_documents_are_each_concept_in_each_genre_and_j_of_linked_ones() -> None:
    unique, linked = world().unique, world().linked
    told = set(zip(unique.concepts.tolist(), unique.genres.tolist(), strict=True))
    assert len(told) == len(unique) and linked.sum() == round(0.6 * 24)
    assert told == {(concept, genre) for concept in range(24) for genre in range(5) if genre != JOINED or linked[concept]}


def test_genres_tell_their_half_of_the_facts_but_for_the_noise() -> None:
    quiet = world(noise=0.0)
    for documents in (quiet.unique, quiet.others, quiet.heldout):
        halves = quiet.truth.reshape(24, 2, FACTS)
        side = [0 if GENRES[genre].startswith("A") else 1 for genre in documents.genres]
        assert np.array_equal(documents.values, halves[documents.concepts, side])
    noisy = world(noise=0.3, concepts=500, oracle_ratio=20)
    share = (noisy.others.values != noisy.facts(noisy.others)).mean()
    assert share == pytest.approx(0.3 * 7 / 8, abs=0.01)


@pytest.mark.parametrize("kind", ["two-names", "shared-name"])
def test_texts_are_read_back(kind: str) -> None:
    made = world(kind=kind)
    read, well_formed = made.read(made.texts(made.others))
    assert well_formed.all()
    for name in ("concepts", "genres", "values"):
        assert np.array_equal(getattr(read, name), getattr(made.others, name))


def test_a_name_follows_letter_by_letter_on_the_other_side() -> None:
    made = world()
    texts = dict(zip(zip(made.unique.concepts, made.unique.genres, strict=True), made.texts(made.unique), strict=True))
    letters: dict[str, str] = {}
    for concept in range(24):
        lower, upper = (texts[concept, genre].split(" ")[1:3] for genre in (0, 2))
        assert "".join(lower).islower() and "".join(upper).isupper()
        for a, b in zip(lower, upper, strict=True):
            assert letters.setdefault(a, b) == b
    assert len(set(letters.values())) == len(letters)
    shared = world(kind="shared-name")
    assert all("".join(text.split(" ")[1:3]).islower() for text in shared.texts(shared.unique))


@pytest.mark.parametrize(
    "text",
    ["", "A1 a b 1 2 3", "A1 a b 1 2 3 4 5", "C1 a b 1 2 3 4", "A1 a 7 1 2 3 4", "A1 a b 1 2 3 c", "A1 a b 1 2 3 9"],
)
def test_a_malformed_text_belongs_to_no_concept(text: str) -> None:
    read, well_formed = world().read([text])
    assert not well_formed[0] and read.concepts[0] == -1


def test_an_unknown_name_belongs_to_no_concept() -> None:
    made = world()
    names = {tuple(name) for name in made.names.tolist()}
    first, second = next((a, b) for a in range(24) for b in range(24) if (a, b) not in names)
    read, well_formed = made.read([f"J1 {chr(97 + first)} {chr(97 + second)} 1 2 3 4"])
    assert well_formed[0] and read.concepts[0] == -1 and read.genres[0] == JOINED


def test_related_pairs_tell_the_same_facts() -> None:
    made = world()
    pairs, unique = made.related_pairs(made.unique), made.unique
    last = unique.genres >= 2
    expected = {
        (a, b)
        for a in range(len(unique))
        for b in range(len(unique))
        if a != b and unique.concepts[a] == unique.concepts[b] and last[a] == last[b]
    }
    assert set(map(tuple, pairs.tolist())) == expected and len(pairs) == len(expected)


def test_the_same_seed_gives_the_same_world_and_another_seed_another() -> None:
    assert np.array_equal(world(seed=3).others.values, world(seed=3).others.values)
    assert not np.array_equal(world(seed=3).truth, world(seed=4).truth)


def test_entropy_and_predictive_are_those_of_the_definition() -> None:
    made = world(noise=0.05)
    told = 0.95 + 0.05 / 8
    assert made.entropy == pytest.approx(-told * math.log(told) - 7 * 0.00625 * math.log(0.00625), rel=1e-12)
    assert made.uniform == math.log(8) == pytest.approx(made.expected_loss(0), rel=1e-12)
    predicted = made.predictive(np.array([[3], [5]]))
    assert predicted.sum(1) == pytest.approx([1, 1]) and predicted[0, 3] == pytest.approx(told**2 + 7 * 0.00625**2, rel=1e-12)


@pytest.mark.parametrize("tellings", [1, 2])
def test_expected_loss_is_the_mean_over_sampled_tellings(tellings: int) -> None:
    made, random = world(noise=0.2), np.random.default_rng(0)
    truth = random.integers(8, size=200_000)
    told = [np.where(random.random(len(truth)) < 0.2, random.integers(8, size=len(truth)), truth) for _ in range(tellings + 1)]
    losses = -np.log(made.predictive(np.stack(told[:-1], axis=1))[np.arange(len(truth)), told[-1]])
    assert made.expected_loss(tellings) == pytest.approx(losses.mean(), abs=4 * losses.std() / len(losses) ** 0.5)
    assert made.entropy < made.expected_loss(2) < made.expected_loss(1) < made.uniform


def test_no_documents_tell_no_facts() -> None:
    none = np.zeros(0, np.int64)
    assert len(Documents(none, none, np.zeros((0, FACTS)))) == 0


def test_without_noise_one_telling_tells_all() -> None:
    made = World(WorldSettings(noise=0))
    assert made.entropy == made.expected_loss(1) == made.expected_loss(2) == 0 and made.uniform == made.expected_loss(0)
