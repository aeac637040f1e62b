"""The token corpus on disk: written, opened, checked and exported."""
