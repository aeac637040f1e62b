"""Benchmarks: ratios measured side by side in one run, refused where the answers are wrong."""
