"""Look at related documents as a table.

python examples/look_at_pairs.py runs/demo/prepare runs/demo/pair/related
"""

import sys

import pyarrow.compute as pc

import sbp_fast


def main() -> None:
    """Print the number of pairs, and the pairs of the highest similarity with the first words of both documents."""
    corpus, pairs = sbp_fast.PreparedCorpus(sys.argv[1]), sbp_fast.PairSet(sys.argv[2])
    table = pairs.table(corpus.unique)  # .to_pandas(), or polars.from_arrow(table), is a dataframe
    seeds, mean = len(pc.unique(table["seed"])), pc.mean(table["score"]).as_py()
    print(f"{len(table)} pairs of {seeds} seeds, similarity {mean:.3f} on average")
    for pair in table.sort_by([("score", "descending")]).slice(0, 3).to_pylist():
        seed, partner = (corpus.text(corpus.unique, pair[name]) for name in ("seed", "partner"))
        print(f"{pair['score']:.3f}  {pair['seed_id']}: {seed[:40]!r}  {pair['partner_id']}: {partner[:40]!r}")


if __name__ == "__main__":
    main()
