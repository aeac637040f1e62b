"""The lab: corpora with known latent concepts, on which every bound is exact, run through the product's own stages."""
