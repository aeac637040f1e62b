"""The sections of the report, from which the page and its table of contents follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sbp_fast.experiment.report.wording import shown_source


@dataclass(frozen=True)
class Section:
    """One section; its template is `sections/ANCHOR.html.jinja`.

    Attributes:
        anchor: id of the element, to which links point.
        title: heading, and entry of the table of contents.
        needs: what a run must have for the section to be shown: nothing, any source of synthetic documents, or one whose
            quality was measured.
    """

    anchor: str
    title: str
    needs: Literal["", "sources", "quality"] = ""

    @property
    def template(self) -> str:
        """Path of the template in this package."""
        return f"sections/{self.anchor}.html.jinja"


SECTIONS = (
    Section("arms", "The arms side by side"),
    Section("training", "How training went"),
    Section("sources", "Sources of synthetic documents", needs="sources"),
    Section("examples", "What the synthesizer wrote", needs="quality"),
    Section("relation", "Did the synthesizer learn a relation?", needs="quality"),
    Section("pairs", "Related pairs", needs="quality"),
    Section("quality", "Quality of the synthesized documents", needs="quality"),
    Section("ledger", "Compute ledger"),
    Section("limits", "Limits"),
    Section("configuration", "Configuration"),
)


def sections_of(results: Mapping[str, Any]) -> list[Section]:
    """Return the sections of a run's report in their order."""
    available = {"": True, "sources": bool(results["sources"]), "quality": shown_source(results) is not None}
    return [section for section in SECTIONS if available[section.needs]]
