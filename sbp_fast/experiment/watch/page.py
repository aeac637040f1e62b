"""The live page: its parts as HTML, in which all text of others is escaped as in the report."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from sbp_fast.errors import UserError
from sbp_fast.experiment.arms import arms_of
from sbp_fast.experiment.report import plots
from sbp_fast.experiment.report.page import REPORT, arm_palette, percent, seconds
from sbp_fast.experiment.report.templates import page_environment
from sbp_fast.experiment.watch.state import RunReader, RunState

REFRESH_SECONDS = 3
PARTS = ("summary", "stages", "curves", "samples")
"""Templates of the parts, and ids of the elements that hold them."""


class LivePage:
    """The page of a run and its parts, made anew for each request.

    Args:
        run: directory of the run.
    """

    def __init__(self, run: Path) -> None:
        self.reader = RunReader(run)
        self._environment = page_environment("sbp_fast.experiment.watch", "sbp_fast.experiment.report")
        self._environment.filters |= {"duration": seconds, "percent": percent}
        self._drawings: dict[str, tuple[object, Markup]] = {}
        self.script = self._environment.get_template("script.js.jinja").render(milliseconds=1000 * REFRESH_SECONDS)

    @property
    def security_policy(self) -> str:
        """Content security policy of the page: its own script and style, its own server, and nothing else."""
        digest = base64.b64encode(hashlib.sha256(self.script.encode()).digest()).decode()
        allowed = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
        return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"

    def parts(self) -> dict[str, str]:
        """Return the title of the page and the HTML of its parts; of a run that cannot be read, the reason."""
        try:
            return self._render(self.reader.read())
        except UserError as error:
            reason = self._environment.from_string("<h1>The run cannot be read</h1><p>{{ error }}</p>")
            return {"title": "sbp-fast watch", "summary": reason.render(error=str(error))}

    def page(self) -> str:
        """Return the whole page.

        Raises:
            UserError: the run cannot be read.
        """
        state = self.reader.read()
        title, *parts = self._render(state).values()
        return self._environment.get_template("watch.html.jinja").render(
            title=title,
            parts=dict(zip(PARTS, map(Markup, parts), strict=True)),
            palette=arm_palette(len(arms_of(state.config))),
            script=Markup(self.script),
            refresh_seconds=REFRESH_SECONDS,
        )

    def _render(self, state: RunState) -> dict[str, str]:
        values = {"state": state, "figures": self._figures(state), "report": REPORT, "left": state.describe_left()}
        html = {part: self._environment.get_template(f"{part}.html.jinja").render(values) for part in PARTS}
        return {"title": f"{state.count('done')}/{len(state.stages)} {state.config.name}", **html}

    def _figures(self, state: RunState) -> list[tuple[Markup, str]]:
        """Return drawings with captions: of each arm the training that began last, and of each synthesizer its tuning."""
        stages = {each.stage.name: each.stage for each in state.stages}
        curves: dict[str, plots.LossCurve] = {}
        for index, arm in enumerate(arms_of(state.config)):
            begun = [name for name, losses in state.losses.items() if stages[name].arm == arm and losses.training]
            for name in begun[-1:]:
                losses = state.losses[name]
                label = name.partition("/")[2]
                curves[name] = plots.LossCurve(label, plots.arm_color(index), losses.training, losses.heldout)
        figures = [("arms", "Pretraining", list(curves.values()), ", ".join(curves))] if curves else []
        for index, (name, losses) in enumerate(state.losses.items()):
            if name.startswith("tune/") and losses.training:
                curve = plots.LossCurve("synthesizer", plots.COLORS["synthesizer"], losses.training, losses.heldout)
                figures.append((f"tuning-{index}", "Tuning the synthesizer", [curve], name))
        return [(self._drawing(key, title, lines), caption) for key, title, lines, caption in figures]

    def _drawing(self, key: str, title: str, curves: Sequence[plots.LossCurve]) -> Markup:
        """Return a drawing, which is drawn again only where a curve has new points."""
        seen = [(curve.label, len(curve.training), len(curve.heldout)) for curve in curves]
        if key not in self._drawings or self._drawings[key][0] != seen:
            self._drawings[key] = seen, Markup(plots.loss_plot(key, title, curves))
        return self._drawings[key][1]
