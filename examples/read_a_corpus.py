"""Read the documents of a prepared corpus, one by one and in batches of a DataLoader with worker processes.

python examples/read_a_corpus.py runs/demo/prepare
"""

import sys

import torch
from torch.utils.data import DataLoader

import sbp_fast


def as_tensor(documents: list) -> list[torch.Tensor]:
    """Copy documents, which are read-only views of files, into tensors."""
    return [torch.tensor(document, dtype=torch.int64) for document in documents]


def main() -> None:
    """Print what the corpus holds, its first and last document, and the tokens of a batch."""
    corpus = sbp_fast.PreparedCorpus(sys.argv[1])
    unique = corpus.unique
    print(f"{len(unique)} unique documents of {unique.tokens} tokens, {len(corpus.heldout)} held out")
    for document in (0, -1):
        print(f"{unique.ids[document]}: {corpus.tokenizer.decode(unique[document])[:60]!r}")
    loader = DataLoader(unique, batch_size=8, collate_fn=as_tensor, num_workers=2, multiprocessing_context="spawn")
    batch = next(iter(loader))
    print(f"a batch has {len(batch)} documents, {sum(map(len, batch))} tokens in all")


if __name__ == "__main__":
    main()
