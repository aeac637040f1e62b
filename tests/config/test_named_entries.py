import pytest

from sbp_fast.errors import UserError
from sbp_fast.registry import Registry


def make_registry() -> Registry[int]:
    registry: Registry[int] = Registry("optimizer")
    registry.register("adamw", 1)
    registry.register("muon", 2)
    return registry


def test_registered_names_give_their_entries_in_order() -> None:
    registry = make_registry()
    assert registry["muon"] == 2 and list(registry) == ["adamw", "muon"] and "adamw" in registry and len(registry) == 2


def test_name_registered_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer 'adamw' is registered twice"):
        make_registry().register("adamw", 3)


def test_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UserError, match=r"optimizer 'adam'.*is unknown.*did you mean adamw\? known: adamw, muon"):
        make_registry()["adam"]
