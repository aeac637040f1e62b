"""Settings as the command line takes them: each key once."""

from collections.abc import Iterable


def overridden(settings: Iterable[str], *changes: str) -> list[str]:
    """Return settings in which changes take the place of those of the same key; tables are merged by the configuration."""
    changed = {change.partition("=")[0] for change in changes if "={" not in change}
    return [setting for setting in settings if setting.partition("=")[0] not in changed] + list(changes)
