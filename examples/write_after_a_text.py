"""Let a synthesizer write documents that are related to a text.

python examples/write_after_a_text.py runs/demo/prepare runs/demo/tune/related "Chad: Economy"
"""

import sys

import sbp_fast


def main() -> None:
    """Print three documents; the same seed gives the same ones."""
    corpus, model = sbp_fast.PreparedCorpus(sys.argv[1]), sbp_fast.load_model(sys.argv[2])
    config = sbp_fast.load_config(["small"], ["synthesize.top_p=0.9", "seed=0"])
    for number, text in enumerate(sbp_fast.generate_documents(model, corpus, sys.argv[3], count=3, config=config), start=1):
        print(f"{number}. {text}")


if __name__ == "__main__":
    main()
