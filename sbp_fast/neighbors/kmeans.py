"""Spherical k-means (Dhillon and Modha, 2001): unit vectors and the unit centroids that they are nearest to."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sbp_fast.neighbors.blocks import in_blocks

BLOCK = 8192
ITERATIONS = 8
PRICE_ROUNDS, STEP = 32, 0.01  # of a price, in units of similarity, for a centroid with e times what it may have


def train_centroids(sample: np.ndarray, count: int, *, seed: int, threads: int, device: str = "cpu") -> np.ndarray:
    """Centroids of a sample.

    Args:
        sample: float32 [vectors, dimension], unit norm; at least `count` vectors.
        device: that computes the products.

    Returns:
        float32 [count, dimension], unit norm. The same from any number of threads.
    """
    generator = np.random.default_rng(seed)
    centroids = sample[generator.choice(len(sample), count, replace=False)]
    for _ in range(ITERATIONS):
        nearest = nearest_centroids(sample, centroids, 1, threads=threads, device=device)[:, 0]
        sums = torch.zeros(count, sample.shape[1]).index_add_(0, torch.from_numpy(nearest), torch.from_numpy(sample)).numpy()
        empty = np.bincount(nearest, minlength=count) == 0
        sums[empty] = sample[generator.choice(len(sample), int(empty.sum()), replace=False)]
        centroids = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return centroids


def nearest_centroids(
    vectors: np.ndarray,
    centroids: np.ndarray,
    count: int,
    *,
    threads: int,
    prices: np.ndarray | None = None,
    device: str = "cpu",
) -> np.ndarray:
    """The `count` centroids of greatest product with each vector, less its price, greatest first. int64 [vectors, count].

    Args:
        device: that computes the products; from another one a vector may have other centroids, by rounding.
    """
    transposed = torch.from_numpy(centroids).to(device).T
    costs = torch.zeros(len(centroids)) if prices is None else torch.from_numpy(prices)
    costs = costs.to(device)

    def work(rows: slice) -> Tensor:
        products = torch.from_numpy(vectors[rows]).to(device) @ transposed
        return products.sub_(costs).topk(count, dim=1).indices.cpu()

    return torch.cat([torch.zeros(0, count, dtype=torch.int64), *in_blocks(len(vectors), BLOCK, work, threads)]).numpy()


def balancing_prices(sample: np.ndarray, centroids: np.ndarray, count: int, most: float, *, threads: int) -> np.ndarray:
    """What centroids must cost so that none is among the `count` nearest of many more than `most` of `sample`.

    Those that few are near to cost nothing: a price that moved vectors there would part them from their neighbours.

    Returns:
        float32 [centroids], in units of similarity.
    """
    prices = np.zeros(len(centroids), dtype=np.float32)
    for _ in range(PRICE_ROUNDS):
        chosen = nearest_centroids(sample, centroids, count, threads=threads, prices=prices)
        sizes = np.bincount(chosen.reshape(-1), minlength=len(centroids))
        if sizes.max() <= most:
            break
        prices += np.float32(STEP) * np.log(np.maximum(sizes, 1) / most).astype(np.float32)
        prices = np.maximum(prices, 0)
    return prices
