"""Spherical k-means (Dhillon and Modha, 2001) of unit vectors."""

from __future__ import annotations

from threading import local

import numpy as np
import torch
from torch import Tensor

from sbp_fast.neighbors.blocks import map_blocks
from sbp_fast.neighbors.vectors import check_lengths

BLOCK = 8192
ITERATIONS = 8
PRICE_ROUNDS, PRICE_STEP = 32, 0.01  # rise of a price, in units of similarity, for a centroid with e times its capacity


def train_centroids(sample: np.ndarray, count: int, *, seed: int, threads: int, device: str = "cpu") -> np.ndarray:
    """Train centroids on a sample.

    Args:
        sample: float32 [vectors, dimension], unit norm; at least `count` vectors.
        count: of centroids.
        seed: of the first centroids, and of those that replace empty ones.
        threads: of the CPU; the result does not depend on it.
        device: that computes the products.

    Returns:
        float32 [count, dimension], unit norm.

    Raises:
        UserError: a centroid is not finite.
    """
    generator = np.random.default_rng(seed)
    centroids = sample[generator.choice(len(sample), count, replace=False)]
    for _ in range(ITERATIONS):
        nearest = nearest_centroids(sample, centroids, 1, threads=threads, device=device)[:, 0]
        sums = torch.zeros(count, sample.shape[1]).index_add_(0, torch.from_numpy(nearest), torch.from_numpy(sample)).numpy()
        empty = ~sums.any(axis=1)  # a centroid without members, or one whose members add up to zero
        sums[empty] = sample[generator.choice(len(sample), int(empty.sum()), replace=False)]
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        check_lengths(lengths[:, 0], lambda centroid: f"centroid {centroid} of {count}")
        centroids = sums / np.maximum(lengths, 1e-12)
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
    """Return the `count` centroids of greatest product, less their price, with each vector. int64 [vectors, count].

    Args:
        vectors: float32 [vectors, dimension].
        centroids: float32 [centroids, dimension].
        count: centroids of each vector, greatest first.
        threads: of the CPU; the result does not depend on it.
        prices: float32 [centroids], in units of similarity; none by default.
        device: that computes the products. Rounding may give a vector other centroids on another device.
    """
    transposed = torch.from_numpy(centroids).to(device).T
    costs = torch.zeros(len(centroids)) if prices is None else torch.from_numpy(prices)
    costs = costs.to(device)

    # one buffer a thread: blocks of tens of megabytes, allocated and freed in turn, leave the heaps of threads full of holes
    buffers = local()

    def nearest_in_block(rows: slice) -> Tensor:
        block = torch.from_numpy(vectors[rows]).to(device)
        if not hasattr(buffers, "products"):
            buffers.products = torch.empty(min(BLOCK, len(vectors)), len(centroids), device=device)
        products = torch.mm(block, transposed, out=buffers.products[: len(block)])
        return products.sub_(costs).topk(count, dim=1).indices.cpu()

    blocks = map_blocks(len(vectors), BLOCK, nearest_in_block, threads)
    return torch.cat([torch.zeros(0, count, dtype=torch.int64), *blocks]).numpy()


def balancing_prices(sample: np.ndarray, centroids: np.ndarray, count: int, capacity: float, *, threads: int) -> np.ndarray:
    """Find prices at which no centroid is among the `count` nearest of many more than `capacity` vectors of the sample.

    A centroid with few vectors has no price: a price there would part vectors from their neighbors.

    Returns:
        float32 [centroids], in units of similarity.
    """
    prices = np.zeros(len(centroids), dtype=np.float32)
    for _ in range(PRICE_ROUNDS):
        chosen = nearest_centroids(sample, centroids, count, threads=threads, prices=prices)
        sizes = np.bincount(chosen.reshape(-1), minlength=len(centroids))
        if sizes.max() <= capacity:
            break
        prices += np.float32(PRICE_STEP) * np.log(np.maximum(sizes, 1) / capacity).astype(np.float32)
        prices = np.maximum(prices, 0)
    return prices
