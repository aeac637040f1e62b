"""Filters of synthetic documents: features, rules and near-duplicates."""
