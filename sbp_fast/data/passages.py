"""Long documents split into passages at the best boundaries that they offer."""

from __future__ import annotations

import re

# from the best boundary to the worst; each match ends in white space, where the next passage begins
BOUNDARIES = tuple(re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"[.!?][\"'\u201d\u2019)\]]*\s+", r"\s+"))


def split_passages(text: str, maximum: int) -> list[str]:
    """Split a text into passages of at most `maximum` characters: at paragraph ends, else at line, sentence or word ends.

    Only white space at the boundaries is lost. A better kind of boundary is passed over where it would make a passage shorter
    than half of the maximum, and the last two passages share what is left, so that no tiny remainder becomes a document.
    """
    text = text.strip()
    passages, start = [], 0
    while (left := len(text) - start) > maximum:
        end = _find_end(text, start, min(maximum, max(left * 2 // 3, 1)))
        passages.append(text[start:end].rstrip())
        start = end
        while text[start].isspace():
            start += 1
    return [*passages, text[start:]]


def _find_end(text: str, start: int, reach: int) -> int:
    """Return where the passage from `start` ends: at most `reach` characters on, not counting white space at its end."""
    for pattern in BOUNDARIES:
        ends = [match.end() for match in pattern.finditer(text, start + reach // 2, start + reach + 1)]
        if ends:
            return ends[-1]
    return start + reach
