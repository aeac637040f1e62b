"""Nearest neighbors of documents: sentence embeddings, kNN backends, and saved indexes."""
