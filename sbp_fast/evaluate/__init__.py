"""Measures of trained models and of synthetic documents: likelihood, multiple choice, quality, and their intervals."""
