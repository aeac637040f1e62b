"""Cutting long documents into passages at the best places that offer themselves."""

from __future__ import annotations

import re

# from the best place to cut to the worst; each match ends in white space, where the next passage begins
BREAKS = tuple(re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"[.!?][\"'\u201d\u2019)\]]*\s+", r"\s+"))


def cut_passages(text: str, maximum: int) -> list[str]:
    """Cut `text` into passages of at most `maximum` characters: at paragraph ends, else line, sentence or word ends.

    Only white space at the cuts is lost. A better kind of place is passed over where it would leave a piece shorter than
    half of what may be taken, and the last two pieces share what is left, so that no crumbs become documents.
    """
    text = text.strip()
    passages, start = [], 0
    while (left := len(text) - start) > maximum:
        cut = _cut(text, start, min(maximum, max(left * 2 // 3, 1)))
        passages.append(text[start:cut].rstrip())
        start = cut
        while text[start].isspace():
            start += 1
    return [*passages, text[start:]]


def _cut(text: str, start: int, reach: int) -> int:
    """Where a passage from `start` ends: at most `reach` characters on, white space at its end not counted."""
    for pattern in BREAKS:
        ends = [match.end() for match in pattern.finditer(text, start + reach // 2, start + reach + 1)]
        if ends:
            return ends[-1]
    return start + reach
