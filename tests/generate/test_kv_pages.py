import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sbp_fast.generate.kv_pages import SCRATCH, OutOfPages, PagePool

PAGES = 12


class Arrivals(RuleBasedStateMachine):
    """Random allocation, sharing and release, checked against a plain list of holders."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, PAGES))
    def take(self, count: int) -> None:
        before = self.pool.free
        if count > before:
            with pytest.raises(OutOfPages):
                self.pool.take(count)
            assert self.pool.free == before
            return
        pages = self.pool.take(count)
        used = {page for holder in self.held for page in holder}
        assert len(set(pages)) == count and not used & set(pages) and SCRATCH not in pages
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.held))
        self.pool.hold(pages)
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def no_page_is_lost(self) -> None:
        assert self.pool.free == PAGES - 1 - len({page for holder in self.held for page in holder})


Arrivals.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestArrivals = Arrivals.TestCase


def test_free_page_can_be_neither_held_nor_released() -> None:
    pool = PagePool(4)
    pages = pool.take(2)
    pool.release(pages)
    for mistake in (pool.hold, pool.release):
        with pytest.raises(ValueError, match=r"hold|held"):
            mistake(pages)
    assert pool.free == 3
