"""The table of the page about one's own corpus, from a record of its run."""

from bench.walkthrough import walkthrough_table

RECORD = {
    "device": "cpu (x86_64)",
    "versions": {"torch": "2.13.0+cpu"},
    "elapsed_seconds": 390,
    "cpu_seconds": 720,
    "seconds": {"prepare": 4.2, "train/baseline": 30.0, "train/sbp": 31.4, "pair/related": 1.0},
    "counts": {
        "prepare": {"documents": 9000, "unique_documents": 450, "heldout_documents": 300, "vocabulary_size": 2048},
        "pair/related": {"pairs": 1234, "seeds": 56},
    },
}


def test_table_sums_the_runs_of_a_stage_and_says_what_came_of_it() -> None:
    lines = walkthrough_table(RECORD).splitlines()
    assert lines[2:5] == [
        "| `prepare` | 1 | 4 | 9,000 passages, 450 of them unique documents, and 300 held out |",
        "| `train` | 2 | 61 |  |",
        "| `pair` | 1 | 1 | 1,234 pairs of 56 seeds |",
    ]
    assert lines[-1] == (
        "6.5 minutes from the start to the report, in which the run had 1.8 cores of the machine, "
        "cpu (x86_64) with torch 2.13.0+cpu."
    )


def test_page_without_a_record_says_that_nothing_was_measured() -> None:
    assert walkthrough_table(None) == "How long the stages take has not been measured."
