"""Sweeps: what SBP reaches in the world of two names as one setting changes.

A setting is one of the world's, such as the share of linked concepts; `share`, the synthetic share of what SBP reads; or
`tokens`, how long the synthesizer is tuned. Each value has runs of its own, one a seed; the values of `share` have their
documents in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbp_fast.errors import UserError
from sbp_fast.lab.metrics import EXCESS
from sbp_fast.lab.results import RELATED, SBP, interval
from sbp_fast.lab.world_run import LabRun, lab_config
from sbp_fast.lab.worlds import Kind, WorldSettings

KIND: Kind = "two-names"
SHARE, TOKENS, ORACLE = "share", "tokens", "oracle"
LABELS = {
    "linked": "linked share of the concepts",
    "noise": "noise",
    SHARE: "synthetic share",
    TOKENS: "tokens that the synthesizer is tuned on",
}
"""Settings that may be swept, with their names on the page; all but `tokens` are shares."""


@dataclass(frozen=True)
class Sweep:
    """A setting and the values that it takes.

    Attributes:
        setting: a key of `LABELS`.
        values: rising, beside the one that the worlds of the lab have anyway.
    """

    setting: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Read `linked=0.3,0.9`.

        Raises:
            UserError: another form, an unknown setting, a value that stands twice, a share that is not from 0 to below 1, or
                tokens that are not a whole number above 0.
        """
        setting, _, listed = text.partition("=")
        if setting not in LABELS:
            raise UserError(f"--sweep {text}", "names no setting that can be swept", f"known: {', '.join(LABELS)}")
        try:
            values = tuple(sorted(float(value) for value in listed.split(",")))
        except ValueError:
            raise UserError(f"--sweep {text}", "is not SETTING=VALUE,VALUE", f"write {setting}=0.3,0.9, say") from None
        if setting == TOKENS:
            allowed, range_ = all(value > 0 and value.is_integer() for value in values), "a whole number above 0"
        else:
            allowed, range_ = all(0 <= value < 1 for value in values), "from 0 to below 1"
        if not allowed or len(set(values)) < len(values):
            raise UserError(f"--sweep {text}", f"a value is not {range_}, or stands twice", "correct the values")
        return cls(setting, values)

    def runs(self, out: Path, seeds: Sequence[int], overrides: Sequence[str], world: Mapping[str, Any]) -> list[LabRun]:
        """Return the runs of the sweep: of each seed and value, or of each seed where `share` is swept.

        Raises:
            UserError: one of the values is that of the lab's own worlds, whose runs would count twice.
        """
        standard = self._value(LabRun(WorldSettings(kind=KIND, **world), out, tuple(overrides)), SBP)
        if standard in self.values:
            raise UserError(f"--sweep {self.setting}", f"{standard:g} is what the lab's own worlds have", "leave it out")
        directory, only = out / "sweeps", (*overrides, *_only_sbp(overrides))
        if self.setting == SHARE:
            only = (*only, f"arms.{SBP}.share={list(self.values)}")
            return [
                LabRun(WorldSettings(kind=KIND, seed=seed, **world), directory / SHARE / f"seed-{seed}", only) for seed in seeds
            ]
        runs = []
        for value in self.values:
            changed, overridden = self._change(value)
            for seed in seeds:
                settings = WorldSettings(kind=KIND, seed=seed, **{**world, **changed})
                path = directory / f"{self.setting}-{value:.10g}" / f"seed-{seed}"
                runs.append(LabRun(settings, path, (*only, *overridden)))
        return runs

    def points(self, runs: Sequence[LabRun], figures: Sequence[Mapping[str, Any]], confidence: float) -> list[dict[str, Any]]:
        """Return each value with what the runs of its seeds reach, and the exact bounds of its worlds.

        Args:
            runs: of the sweep, and of the lab's own worlds of the same kind, whose value is a point as well.
            figures: of each of these runs, as `run_world` returns them.
            confidence: of the intervals.

        Returns:
            `value`; `excess` of SBP; `conditional` and `exact`, the synthesizer's loss and the least one; and `bounds`.
        """
        measured: dict[float, list[tuple[float, Mapping[str, float], Mapping[str, float]]]] = {}
        for run, figure in zip(runs, figures, strict=True):
            for name, arm in run.config.arms.items():
                if arm.synthetic == RELATED and arm.enabled:
                    excess, synthesizer = figure["arms"][name][EXCESS]["test"], figure["synthesizers"][RELATED]
                    measured.setdefault(self._value(run, name), []).append((excess, synthesizer, figure["bounds"]))
        return [
            {
                "value": value,
                "excess": interval([excess for excess, _, _ in measured[value]], confidence),
                **{
                    name: interval([synthesizer[name] for _, synthesizer, _ in measured[value]], confidence)
                    for name in ("conditional", "exact")
                },
                "bounds": dict(measured[value][0][2]),
            }
            for value in sorted(measured)
        ]

    def _change(self, value: float) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return what a value changes: settings of the world, and overrides of the configuration."""
        if self.setting == TOKENS:
            return {}, (f"synthesizer.tokens={value:.0f}",)
        return {self.setting: value}, ()

    def _value(self, run: LabRun, arm: str) -> float:
        """Return the value of the setting for an arm of a run."""
        if self.setting == SHARE:
            return run.config.arms[arm].share
        return float(run.config.synthesizer.tokens if self.setting == TOKENS else getattr(run.world, self.setting))


def _only_sbp(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that leave SBP, and the oracle as the baseline that every run has."""
    arms = lab_config(overrides).arms
    return [f"baseline={ORACLE}", *(f"arms.{name}.enabled=false" for name in arms if name not in (SBP, ORACLE))]
