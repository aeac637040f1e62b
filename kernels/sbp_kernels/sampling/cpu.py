"""`sample_tokens` on the CPU, row by row without sorting; it holds no lock, so that batches can be sampled side by side.

Every pass over a row is a simple loop that the compiler turns into vector instructions; sums are let free of their order
for that, which depends on the length of the row alone. Where a cut ends is found by sums over what lies above seven logits
at a time, until few tokens are left in between, and only those are sorted.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Seven = tuple[np.float32, np.float32, np.float32, np.float32, np.float32, np.float32, np.float32]

BLOCK = 64  # tokens that are passed over at once where few of a row are looked for
FEW = 64  # tokens that are sorted by insertion
ROUNDS = 3  # of the search for a cut; each leaves an eighth of the range
DOUBT = 1e-5  # relative; sums of float32 over a row err by less

# exp(x) = 2**n * exp(r), |r| <= ln(2) / 2, by a minimax polynomial of exp(r) that errs by 1e-7 (Cephes, expf)
LOWEST = np.float32(-87)  # below, 2**n would not be a normal number
LOG2_E, LN_2_HIGH, LN_2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
E_0, E_1, E_2, E_3, E_4, E_5 = (
    np.float32(x)
    for x in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
ROUNDING = np.float32(3 << 22)  # added to a small number, it leaves the nearest integer in the lowest bits
ZERO, ONE, TWO, THREE, FOUR, FIVE, SIX, SEVEN = (np.float32(x) for x in range(8))


@njit(cache=True, nogil=True, error_model="numpy")  # which divides by zero without raising
def sample(
    logits: Floats, uniforms: NDArray[np.float64], forbidden: NDArray[np.int64], temperature: float, top_p: float, top_k: int
) -> tuple[NDArray[np.int64], Floats]:
    """int64 [B] tokens and float32 [B] log-probabilities; see `sampling.sample_tokens`."""
    rows, vocabulary = logits.shape
    forbidden = np.unique(forbidden)
    tokens, log_probabilities = np.empty(rows, np.int64), np.empty(rows, np.float32)
    allowed, weights, ones = np.empty(vocabulary, np.float32), np.empty(vocabulary, np.float32), np.ones(vocabulary, np.float32)
    for row in range(rows):
        allowed[:] = logits[row]
        for token in forbidden:
            allowed[token] = -np.inf
        largest = _largest(allowed)
        _weigh(allowed, largest, np.float32(1), weights)
        log_total = largest + math.log(_total(weights))
        for token in forbidden:
            log_total = np.logaddexp(log_total, logits[row, token])
        if temperature == 0:
            tokens[row] = _first(allowed, largest)
        else:
            if temperature != 1:
                _weigh(allowed, largest, np.float32(1 / temperature), weights)
            if 0 < top_k < vocabulary:
                _cut(allowed, weights, ones, top_k, np.nextafter(_lowest(allowed), np.float32(-np.inf)), largest)
            if top_p < 1:
                total = _total(weights)
                # all tokens below weigh less together than half of what is cut
                lowest = np.float32(largest - temperature * math.log(2 * vocabulary / ((1 - top_p) * total)))
                lowest = min(lowest, np.nextafter(largest, np.float32(-np.inf)))
                _cut(allowed, weights, weights, top_p * total, lowest, largest)
            tokens[row] = _draw(weights, uniforms[row])
        log_probabilities[row] = logits[row, tokens[row]] - log_total
    return tokens, log_probabilities


@njit(cache=True, nogil=True)
def _cut(allowed: Floats, weights: Floats, measures: Floats, target: float, low: np.float32, high: np.float32) -> None:
    """Leave a weight only to the most probable tokens whose measures sum to `target`.

    The last of them has a logit above `low`, and none has one above `high`.
    """
    for _ in range(ROUNDS):
        step = np.float32((high - low) / 8)
        pivots = (
            low + step, low + TWO * step, low + THREE * step, low + FOUR * step,
            low + FIVE * step, low + SIX * step, low + SEVEN * step,
        )  # fmt: skip
        for number, found in enumerate(_sums_above(allowed, measures, pivots)):
            if found >= target * (1 + DOUBT):
                low = max(low, pivots[number])
            elif found < target * (1 - DOUBT):
                high = min(high, pivots[number])
    ids = _between(allowed, low, high)
    held = _sum_above(allowed, measures, high)
    edge, last = high, -1
    for token in _sorted(allowed, ids):
        last = token
        edge = allowed[last]
        held += measures[last]
        if held >= target:
            break
    _drop_below(allowed[: last + 1], edge, weights[: last + 1])
    _drop_below(allowed[last + 1 :], np.nextafter(edge, np.float32(np.inf)), weights[last + 1 :])


@njit(cache=True, nogil=True)
def _sorted(allowed: Floats, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids, which ascend, from the greatest logit on; of equal ones the lower first."""
    if len(ids) > FEW:
        return ids[np.argsort(-allowed[ids], kind="mergesort")]
    for place in range(1, len(ids)):
        token = ids[place]
        while place > 0 and allowed[ids[place - 1]] < allowed[token]:
            ids[place] = ids[place - 1]
            place -= 1
        ids[place] = token
    return ids


@njit(cache=True, nogil=True)
def _draw(weights: Floats, uniform: float) -> int:
    """The token at which the running sum of the weights passes this share of all."""
    vocabulary = len(weights)
    sums = np.empty(-(-vocabulary // BLOCK))
    held = 0.0
    for block in range(len(sums)):
        sums[block] = _total(weights[block * BLOCK : (block + 1) * BLOCK])
        held += sums[block]
    target, running, block = uniform * held, 0.0, 0
    while block + 1 < len(sums) and running + sums[block] <= target:
        running += sums[block]
        block += 1
    drawn = -1
    for token in range(block * BLOCK, min((block + 1) * BLOCK, vocabulary)):
        running += weights[token]
        if weights[token] > 0:
            drawn = token
        if running > target:
            break
    token = vocabulary - 1
    while drawn < 0 and token >= 0:  # rounding left the target beyond the last weight
        drawn = token if weights[token] > 0 else -1
        token -= 1
    return max(drawn, 0)


@njit(cache=True, nogil=True)
def _between(allowed: Floats, low: np.float32, high: np.float32) -> NDArray[np.int64]:
    """Ids, ascending, of the tokens with logits in (low, high]: mostly few, so that most blocks hold none."""
    ids, found = np.empty(len(allowed) + 1, np.int64), 0
    for start in range(0, len(allowed), BLOCK):
        part = allowed[start : start + BLOCK]
        if _count(part, low, high):
            for place in range(len(part)):  # without a branch, which would be guessed wrongly at each of them
                ids[found] = start + place
                found += int((part[place] > low) & (part[place] <= high))
    return ids[:found]


@njit(cache=True, nogil=True)
def _count(logits: Floats, low: np.float32, high: np.float32) -> np.int32:
    found = np.int32(0)
    for place in range(len(logits)):
        found += np.int32((logits[place] > low) & (logits[place] <= high))
    return found


@njit(cache=True, nogil=True)
def _drop_below(allowed: Floats, edge: np.float32, weights: Floats) -> None:
    for place in range(len(weights)):
        weights[place] = weights[place] if allowed[place] >= edge else ZERO


@njit(cache=True, nogil=True)
def _weigh(allowed: Floats, largest: np.float32, factor: np.float32, weights: Floats) -> None:
    """Set weights to exp((allowed - largest) * factor)."""
    for token in range(len(allowed)):
        exponent = (allowed[token] - largest) * factor
        weight = _exp(exponent)  # unconditionally, for vectors
        weights[token] = weight if exponent >= LOWEST else ZERO


@njit(cache=True, nogil=True)
def _exp(x: np.float32) -> np.float32:
    x = max(x, LOWEST)
    shifted = np.float32(x * LOG2_E + ROUNDING)
    nearest = shifted - ROUNDING
    rest = x - nearest * LN_2_HIGH - nearest * LN_2_LOW
    polynomial = ((((E_0 * rest + E_1) * rest + E_2) * rest + E_3) * rest + E_4) * rest + E_5
    power = np.int32((np.float32(shifted).view(np.int32) << np.int32(23)) + np.int32(0x3F800000)).view(np.float32)
    return (polynomial * rest * rest + rest + ONE) * power


@njit(cache=True, nogil=True)
def _largest(row: Floats) -> np.float32:
    """By its bits, as integers that order like the numbers: the greatest of integers needs no order, and takes vectors."""
    bits, found = row.view(np.int32), np.int32(-(2**31))
    for place in range(len(bits)):
        found = max(found, np.int32(bits[place] ^ ((bits[place] >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(found ^ ((found >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@njit(cache=True, nogil=True)
def _lowest(row: Floats) -> np.float32:
    """The least that is finite."""
    found = np.float32(np.inf)
    for number in row:
        if number > -np.inf:
            found = min(found, number)
    return found


@njit(cache=True, nogil=True)
def _first(row: Floats, number: np.float32) -> int:
    for token in range(len(row)):
        if row[token] == number:
            return token
    return 0


# `reassoc` lets the compiler sum in the order that suits vectors


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _total(weights: Floats) -> float:
    total = 0.0
    for token in range(len(weights)):
        total += float(weights[token])
    return total


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _sum_above(allowed: Floats, measures: Floats, edge: np.float32) -> float:
    total = 0.0
    for token in range(len(allowed)):
        total += float(measures[token] if allowed[token] > edge else ZERO)
    return total


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _sums_above(allowed: Floats, measures: Floats, edges: Seven) -> Seven:
    """Sum of the measures of the logits above each of the edges."""
    e_1, e_2, e_3, e_4, e_5, e_6, e_7 = edges
    s_1 = s_2 = s_3 = s_4 = s_5 = s_6 = s_7 = ZERO
    for token in range(len(allowed)):
        logit, measure = allowed[token], measures[token]
        s_1 += measure if logit > e_1 else ZERO
        s_2 += measure if logit > e_2 else ZERO
        s_3 += measure if logit > e_3 else ZERO
        s_4 += measure if logit > e_4 else ZERO
        s_5 += measure if logit > e_5 else ZERO
        s_6 += measure if logit > e_6 else ZERO
        s_7 += measure if logit > e_7 else ZERO
    return s_1, s_2, s_3, s_4, s_5, s_6, s_7
