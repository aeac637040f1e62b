"""Checks that a tokenizer gives back the text that it encoded.

Everything behind `prepare` takes the decoded ids of a document for its text: bits per byte, filters, seeds.
A tokenizer that lowercases, normalises or drops what it does not know spoils all of them without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sbp_fast.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from sbp_fast.errors import UserError

CHECKED_BYTES = 256 << 10  # of the corpus
SETTING = "corpus.tokenizer"
HARD_TEXTS = (
    "Upper and lower Case, THE SAME words the Same",
    "two  spaces,   three,\ttab\n\nblank line\n   indented\r\n",
    " a leading space and a trailing one ",
    "don ' t ( join ) these , marks . nor [ those ] ! do not 're 've 's",
    "caf\u00e9 cafe\u0301 na\u00efve \ufb01 \u2460 \u00bd \u212b \uff21",
    "\u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \U0001f469\u200d\U0001f467 \U0001d11e",
    "\u00a0 \u200b \u2028",
    "0123456789 3.14159 1,000,000 0x1F",
    "\x00\x01\x1b\x7f",
    "<s> </s> [UNK] [CLS] <unk> <pad> <0x0A> \u0120 ## @@",
)
"""Texts that common tokenizers change: by normalising, lowercasing, dropping white space or unknown characters.

They are checked behind a space: whether a tokenizer that puts one before every text changes the corpus is up to the corpus.
"""


def check_round_trips(tokenizer: Tokenizer, texts: Iterable[str], *, lossy: bool) -> dict[str, int]:
    """Encode and decode hard texts and texts of the corpus.

    Args:
        tokenizer: to check.
        texts: of the corpus; no more than CHECKED_BYTES of them are read.
        lossy: whether the user accepts losses.

    Returns:
        "round_trips", the texts of the corpus that were checked, and "round_trips_lost", those that came back otherwise.

    Raises:
        UserError: a text comes back otherwise, unless `lossy`; a text cannot be encoded at all; or a text can contain a special
            token, by which it would forge the bounds of a document.
    """
    for name in SPECIAL_TOKENS:
        if set(tokenizer.encode(f"a {name} b {name}")) & {tokenizer.begin, tokenizer.end, tokenizer.partner}:
            raise UserError(SETTING, f"a text that spells {name} is encoded as that token", "rename the token, or train one")
    hard = [f" {text}" for text in (*HARD_TEXTS, *(f"a {name} b" for name in tokenizer.added_tokens))]
    sample = list(first_texts(texts))
    lost = _changed(tokenizer, sample)
    changed = [*lost, *_changed(tokenizer, hard)]
    if changed and not lossy:
        text, returned = changed[0]
        share = f"; of {len(sample)} texts of the corpus {len(lost)} are changed" if sample else ""
        raise UserError(
            SETTING,
            f"does not give back what it encodes: {_difference(text, returned)}{share}",
            "take a byte-level tokenizer or train one; corpus.lossy_tokenizer = true accepts and counts the losses",
        )
    return {"round_trips": len(sample), "round_trips_lost": len(lost)}


def _changed(tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return the texts that come back otherwise, each with what came back."""
    returned = (tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts))
    return [(text, other) for text, other in zip(texts, returned, strict=True) if text != other]


def _difference(text: str, returned: str) -> str:
    """Describe the first difference of two texts."""
    pairs = enumerate(zip(text, returned, strict=False))
    start = max(next((index for index, (one, other) in pairs if one != other), min(len(text), len(returned))) - 10, 0)
    return f"{text[start : start + 30]!r} comes back as {returned[start : start + 30]!r}"


def first_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the first texts of a corpus, CHECKED_BYTES of them: enough to check what encodes them."""
    size = 0
    for text in texts:
        if size >= CHECKED_BYTES:
            return
        size += len(text.encode())
        yield text
