"""Batches of training: the order of packed sequences, packing, prefetching."""
