"""Features of documents beside brute force."""

import io
import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast import data
from sbp_fast.config import FilterConfig
from sbp_fast.filters.features import LONGEST_RUN, compression_ratios, malformed_character_ratios

RANDOM = np.random.default_rng(7)

WELL_FORMED = ["plain text, with (punctuation); 50% off at $3 + 4 = £7\n\ttabs", "“Größe” — 文字、です。", "נ ب ñ e\u0301 £ €"]


def test_real_text_of_many_scripts_has_no_malformed_characters() -> None:
    assert malformed_character_ratios(WELL_FORMED).tolist() == [0, 0, 0]


def test_malformed_characters_are_counted() -> None:
    texts = ["ab\ufffdd", "ab\x00\x1b", "♥☃ab", "-" * (LONGEST_RUN + 8), "ab" * 100, ""]
    assert malformed_character_ratios(texts).tolist() == [0.25, 0.5, 0.5, 8 / (LONGEST_RUN + 8), 0, 0]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_malformed_characters_equal_brute_force(text: str) -> None:
    def well_formed(character: str) -> bool:
        kind = unicodedata.category(character)
        if character == "\ufffd" or kind in ("Co", "Cn", "So"):
            return False
        if kind == "Cc":
            return character in "\t\n\r"
        return kind not in ("Sm", "Sk") or character.isascii()

    stretches = [len(list(group)) for _, group in itertools.groupby(text)]
    if max(stretches, default=0) <= LONGEST_RUN:
        assert malformed_character_ratios([text])[0] * max(len(text), 1) == pytest.approx(
            sum(not well_formed(character) for character in text)
        )


def test_compression_ratio_is_low_for_repetitive_text_alone() -> None:
    words = [f"w{number}" for number in RANDOM.integers(200, size=300)]
    short, long, endless, empty = compression_ratios([" ".join(words[:4]), " ".join(words), "the same. " * 200, ""])
    assert short > long > 0.25 > endless > 0 and empty == 1


def test_default_thresholds_reject_nothing_of_the_embedded_corpus() -> None:
    path = Path(data.__file__).parent / "embedded" / "default.jsonl.zst"
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        lines = io.TextIOWrapper(stream, "utf-8").readlines()
    texts = [json.loads(line)["text"] for line in lines[::10]]
    config = FilterConfig()
    assert compression_ratios(texts).min() > config.minimum_compression_ratio
    assert malformed_character_ratios(texts).max() < config.maximum_malformed_characters / 4
