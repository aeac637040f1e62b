"""Encoders, which turn texts into ids for `prepare`: the library `tokenizers`, or gigatoken, which gives the same ids faster.

gigatoken (https://github.com/marcelroed/gigatoken, `sbp-fast[gigatoken]`) is imported only where it may be chosen. It is a
young library, so its ids are compared with those of `tokenizers`: before it is chosen, on texts of the corpus and on unusual
texts, and while it runs, on a sample of the documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from sbp_fast.data.round_trip import first_texts
from sbp_fast.data.tokenizer import TOKENIZER, Tokenizer, join_ids
from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.files import dump_json, parse_json

EncoderName = Literal["tokenizers", "gigatoken"]
SETTING, OTHERWISE = "corpus.encoder", 'set it to "tokenizers"'
SAMPLED = 1000  # one document in this many is encoded both ways
RENEWED_BYTES = 128 << 20  # of text, after which gigatoken is reloaded: its cache of words has no bound
ODD_TEXTS = (
    "",
    *(" " * length for length in (1, 4, 300)),
    "\r\n\r\n \t\n  \t x  \n\n  b\n",
    "=" * 300 + "\n" * 30 + "a" * 3000,
    "1234567890 x1y22z333 3.14159 1,000,000 0x1F",
    "don't DON'T we'Ll I'VE 'tis ''s '\u017f '\u212a",
    '("quoted")...!?\n--- ***\r\na_b-c/d\\e@f.g #h $i',
    "e\u0301 e\u0301\u0323 \u0301 !\u0308 1\u0308 \u0334\u0335\u0336 \u0337",
    "\U0001f469\u200d\U0001f467\ufe0f\U0001f1fa\U0001f1f8",
    "<s></s>[MASK]<|im_start|>user\n<|endoftext|>",
)
ODD_CHARACTERS = [*range(0x3100), *range(0x3100, 0xD800, 251), *range(0xE000, 0x110000, 251)]


class Encoder(Protocol):
    """Encodes the texts of documents."""

    def encode(self, texts: pa.ChunkedArray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts, without special tokens.

        Args:
            texts: of the documents.
            hashes: uint64 [documents], hashes of the texts, which select those that are encoded both ways.

        Returns:
            The concatenated ids, uint32 [tokens], and the number of ids of each text, int64 [documents].

        Raises:
            IdsDiffer: the two libraries do not agree.
        """


class IdsDiffer(TransientError):
    """gigatoken gave other ids than `tokenizers`."""


def choose_encoder(asked: str, tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[EncoderName, str]:
    """Choose the encoder.

    Args:
        asked: "auto", "tokenizers" or "gigatoken".
        tokenizer: to encode with.
        texts: of the corpus; no more than CHECKED_BYTES of them are read.

    Returns:
        The name, and a description with the version and the reason why "auto" did not choose gigatoken.

    Raises:
        UserError: gigatoken was asked for and is not installed, cannot load this tokenizer or gives other ids.
    """
    standard = f"tokenizers {version('tokenizers')}"
    if asked == "tokenizers" or (asked == "auto" and find_spec("gigatoken") is None):
        return "tokenizers", standard
    try:
        GigatokenEncoder(tokenizer).check([*ODD_TEXTS, *_odd_characters(), *_spellings(tokenizer), *first_texts(texts)])
    except UserError as error:
        if asked == "gigatoken":
            raise
        return "tokenizers", f"{standard}: {error.what}"
    return "gigatoken", f"gigatoken {version('gigatoken')}"


def make_encoder(name: EncoderName, tokenizer: Tokenizer) -> Encoder:
    """Return the encoder that `choose_encoder` named."""
    return GigatokenEncoder(tokenizer) if name == "gigatoken" else TokenizersEncoder(tokenizer)


def import_gigatoken() -> tuple[Any, Any]:
    """Import gigatoken, and awkward, whose arrays it takes and returns.

    Raises:
        UserError: they are not installed.
    """
    try:
        return import_module("gigatoken"), import_module("awkward")
    except ImportError as error:
        remedy = f"pip install 'sbp-fast[gigatoken]', or {OTHERWISE}"
        raise UserError(SETTING, f"gigatoken cannot be imported: {error}", remedy) from None


class TokenizersEncoder:
    """Encodes with the library `tokenizers`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: pa.ChunkedArray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode as `Encoder.encode` says."""
        return join_ids(self._tokenizer.encode_batch(texts.to_pylist()))


class GigatokenEncoder:
    """Encodes with gigatoken, on one thread: the processes of `prepare` are the parallelism.

    Raises:
        UserError: it is not installed, or cannot load the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._json = tokenizer, _text_only(tokenizer)
        self._gigatoken, self._awkward = import_gigatoken()
        self._begin()

    def _begin(self) -> None:
        try:
            self._encoder = self._gigatoken.Tokenizer.from_json(self._json)
        except Exception as error:  # noqa: BLE001  (its exceptions are not documented)
            reason = str(error).strip().splitlines()[0]  # the other lines quote its source
            raise UserError(SETTING, f"gigatoken cannot load this tokenizer: {reason}", OTHERWISE) from None
        self._encoded = 0

    def encode(self, texts: pa.ChunkedArray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode as `Encoder.encode` says; a sample of the texts is encoded with `tokenizers`, too."""
        tokens, lengths = self._encode(texts.combine_chunks())
        sample = hashes % np.uint64(SAMPLED) == 0
        if sample.any():
            self._compare(texts.filter(sample).to_pylist(), tokens[np.repeat(sample, lengths)], lengths[sample])
        return tokens, lengths

    def check(self, texts: Sequence[str]) -> None:
        """Encode texts both ways.

        Raises:
            IdsDiffer: with the first text whose ids differ.
        """
        self._compare(texts, *self._encode(pa.array(texts, pa.large_string())))

    def _encode(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        if self._encoded >= RENEWED_BYTES:
            self._begin()
        self._encoded += texts.nbytes
        ids = self._encoder.encode_batch(self._awkward.from_arrow(texts), parallel=False)
        return np.asarray(self._awkward.flatten(ids), np.uint32), np.asarray(self._awkward.num(ids), np.int64)

    def _compare(self, texts: Sequence[str], tokens: np.ndarray, lengths: np.ndarray) -> None:
        ends = np.cumsum(lengths)
        for text, expected, start, end in zip(texts, self._tokenizer.encode_batch(texts), ends - lengths, ends, strict=True):
            if tokens[start:end].tolist() != expected:
                shown = repr(text if len(text) <= 60 else f"{text[:60]}...")
                raise IdsDiffer(SETTING, f"gigatoken gives other ids than tokenizers for {shown}", OTHERWISE)


def _text_only(tokenizer: Tokenizer) -> str:
    """Return the tokenizer's file without special tokens, so that a text that spells one is encoded as characters."""
    content = parse_json(tokenizer.to_json())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    content["post_processor"] = None
    return dump_json(content, TOKENIZER)


def _odd_characters() -> Iterator[str]:
    """Yield characters of all kinds next to letters, digits, spaces and themselves."""
    for start in range(0, len(ODD_CHARACTERS), 64):
        characters = map(chr, ODD_CHARACTERS[start : start + 64])
        yield "".join(f"{character}a {character}1{character}{character} {character}\n" for character in characters)


def _spellings(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts that spell the added tokens of a tokenizer."""
    for token in parse_json(tokenizer.to_json())["added_tokens"]:
        yield from (token["content"], f"a {token['content']} b", f"a{token['content']}b")
