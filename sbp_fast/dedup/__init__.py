"""Exact duplicates and near-duplicates: shingles, MinHash, LSH, clusters."""
