"""The benchmark of whole training steps on a CPU."""

import numpy as np
import torch

from bench import steps
from sbp_fast.config.files import load_config
from sbp_fast.train.data.batches import NO_TARGET

CONFIG = load_config(["demo"])
SHAPE, VOCABULARY = CONFIG.model, CONFIG.corpus.vocabulary_size


def test_transformers_padded_and_packed_forms_have_the_loss_of_ours() -> None:
    made = steps.make_documents(steps.documents(steps.LENGTHS, 300), VOCABULARY)
    check = steps._verify(SHAPE, VOCABULARY, made)
    assert check["right"] and check["errors"].keys() == {"padded_batches", "packed_batch"}


def test_every_form_holds_each_target_once() -> None:
    made = steps.make_documents(steps.documents(steps.LENGTHS, 2000), VOCABULARY)
    expected = np.sort(made.targets[made.targets != NO_TARGET])
    for form in (steps.padded_batches, steps.packed_batch):
        labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in form(made)])
        assert np.array_equal(np.sort(labels[labels != NO_TARGET].numpy()), expected)


def test_only_partners_carry_loss_and_sharing_seeds_saves_work() -> None:
    cases = [steps._seeds_case("demo", SHAPE, VOCABULARY, partners, 2048) for partners in steps.PARTNERS]
    savings = [case.statistics["counted speed-up"] for case in cases]
    assert savings == sorted(savings) and savings[0] == 1 and 1.3 < savings[-1] < 1.8
    made = steps.make_documents(steps.whole_trees(4, 1300), VOCABULARY)
    for rows, parent in zip(made.parts, made.tree[1], strict=True):
        assert (made.targets[rows][:-1] == NO_TARGET).all() == (parent < 0)
