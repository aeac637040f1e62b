"""Raw documents, tokenizers and the token shards made of them."""
