"""Related pairs of documents: candidates, criteria and caps."""
