import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fabricated_counts import METRICS, comparison, judge_counts, relation
from fabricated_run import CONFIG, write_run, write_stage
from fabricated_texts import HOSTILE, HOSTILE_SHOWN, prose
from rich.console import Console

from sbp_fast.config import ArmConfig, SourceConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.experiment.report import plots, wording
from sbp_fast.experiment.report.examples import collect_triples
from sbp_fast.experiment.report.page import _tokens_plot, write_report
from sbp_fast.experiment.report.summary import summary_table
from sbp_fast.experiment.report.templates import page_environment
from sbp_fast.experiment.sources import sources_of
from sbp_fast.pipeline.seals import read_sealed_json, write_sealed_json

VOID = {"meta", "br", "img", "link", "input", "hr"}

RELATED = sources_of(CONFIG)["related"]


class Page(HTMLParser):
    """Checks nesting and unique ids, and keeps tags, the text of each table cell and the numbers behind it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: set[str] = set()
        self.outside_data: list[str] = []  # text of table cells beside <data>
        self.data: list[tuple[float, str]] = []
        self.article_texts: list[str] = []
        self._classes: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if (id := found.get("id")) is not None:
            assert id not in self.ids, f"two elements have the id {id}"
            self.ids.add(id)
        if tag not in VOID:
            self.open.append(tag)
            self._classes.append(found.get("class") or "")
        if tag == "data":
            self.data.append((float(found["value"] or "nan"), ""))
        if self._classes and self._classes[-1] == "text" and tag == "div":
            self.article_texts.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()
        self._classes.pop()

    def handle_data(self, text: str) -> None:
        if "data" in self.open:
            value, shown = self.data[-1]
            self.data[-1] = (value, shown + text)
        elif "td" in self.open:
            self.outside_data.append(text)
        if "text" in self._classes:
            self.article_texts[-1] += text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_run(tmp_path_factory.mktemp("report") / "run")
    write_report(directory)
    return directory


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def numbers(value: Any) -> set[float]:
    """Every number in nested dictionaries and lists."""
    if isinstance(value, dict | list):
        return set().union(*map(numbers, value.values() if isinstance(value, dict) else value)) if value else set()
    return {float(value)} if isinstance(value, int | float) else set()


def test_report_says_what_a_model_pretrained_elsewhere_may_have_read(run: Path, tmp_path: Path) -> None:
    start = {"related": SourceConfig(model=str(tmp_path / "gone/Qwen3-0.6B"))}
    other = write_run(tmp_path / "run", config=CONFIG.model_copy(update={"sources": CONFIG.sources | start}))
    write_stage(other / "import/related", "import", {"positions": 4096})
    write_report(other)  # the model itself need not be there any more
    shown, own = (" ".join((directory / "report.html").read_text().split()) for directory in (other, run))
    for words in (
        "tuning has not seen them; what Qwen3-0.6B, a model pretrained elsewhere, has seen is unknown.",
        "The synthesizer of related starts from Qwen3-0.6B, a model pretrained elsewhere: what arms gain by its documents may",
    ):
        assert words in shown and words not in own
    assert "neither the synthesizer nor the model that it starts from has seen them" in own


def test_every_number_of_the_report_is_in_results_json(run: Path, page: Page) -> None:
    known = numbers(json.loads((run / "results.json").read_text()))
    shown_examples = numbers(collect_triples(run, RELATED)) | numbers(
        json.loads((run / "pair/related/examples.json").read_text())
    )
    assert len(page.data) > 150
    for value, shown in page.data:
        assert value in known | shown_examples, f"{shown} ({value}) is not in results.json"
    for text in page.outside_data:
        assert not re.search(r"\d", text), f"a number typed into a table: {text!r}"


def test_shown_numbers_equal_their_exact_values_when_rounded(page: Page) -> None:
    plain = re.compile(r"[+-]?\d+(\.\d+)?%?")
    checked = 0
    for value, shown in page.data:
        shown = shown.replace(wording.MINUS, "-")
        if plain.fullmatch(shown):
            number = float(shown.strip("%"))
            digits = len(shown.strip("%").partition(".")[2])
            assert min(abs(number - value), abs(number - 100 * value)) <= 0.5 * 10**-digits + 1e-9, (value, shown)
            checked += 1
    assert checked > 80


def test_report_loads_no_other_resource(run: Path, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "audio", "video"}
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    style = re.search(r"<style>(.*?)</style>", (run / "report.html").read_text(), re.DOTALL)
    assert style is not None and "@import" not in style[1] and "url(" not in style[1]


def test_hostile_document_text_is_shown_and_not_executed(run: Path, page: Page) -> None:
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    corpus = PreparedCorpus(run / "prepare")
    assert corpus.text(corpus.unique, 1) == HOSTILE
    assert page.article_texts.count(HOSTILE_SHOWN) >= 3  # as a seed, as a partner and as a synthetic document


def test_candidates_of_each_similarity_bin_are_shown_with_their_outcome(run: Path) -> None:
    text = (run / "report.html").read_text()
    shown = text[text.index("Candidates of every similarity") : text.index("</details>")]
    assert shown.count("<h3>") == 2 and shown.count("qualifies</span>") == 1 and shown.count("below band</span>") == 1
    assert "even-1" in shown and prose(1) in shown and HOSTILE not in shown


def test_examples_have_seed_best_partner_and_reject_reason(run: Path) -> None:
    triples = collect_triples(run, RELATED)
    corpus = PreparedCorpus(run / "prepare")
    assert len(triples) == 16
    assert {triple["reason"] for triple in triples} == {None, "unfinished", "repetition", "copies_corpus"}
    first = next(triple for triple in triples if triple["seed_id"] == corpus.unique.ids[0])
    assert first["partner_id"] == corpus.unique.ids[3] and first["score"] == pytest.approx(0.81)
    alone = next(triple for triple in triples if triple["seed_id"] == corpus.unique.ids[7])
    assert alone["partner"] is None and alone["score"] is None
    assert triples == collect_triples(run, RELATED)


def test_report_of_a_run_without_gain_claims_none(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", comparison(sbp=0.003, oracle=-0.002))
    text = write_report(directory).read_text()
    assert "SBP made no measurable difference to the repetition baseline" in text
    assert "Not given: the oracle&#39;s own gain is not distinguishable from zero" in text
    assert 'class="change better"' not in text and 'class="change worse"' not in text


def test_report_of_single_runs_has_figures_and_no_verdict_color_or_share(tmp_path: Path) -> None:
    arms = {name: arm.model_copy(update={"seeds": (0,)}) for name, arm in CONFIG.arms.items()}
    directory = write_run(tmp_path / "run", comparison(runs=1), config=CONFIG.model_copy(update={"arms": arms}))
    text = write_report(directory).read_text().replace(wording.MINUS, "-")
    assert "SBP against the repetition baseline: one run each, no conclusion" in text
    assert '<span class="change unreplicated"><data value="-0.021">-0.021</data> <span class="note">one run each: no' in text
    assert 'class="change better"' not in text and 'class="change worse"' not in text and "gain:" not in text
    body = re.sub(r"(lower|higher) is better", "", text[text.index("<body>") :])
    assert not re.search(r"better|worse|improve", body)


def test_difference_plot_colors_only_what_excludes_zero() -> None:
    def draw(**options: Any) -> str:
        compared = comparison(**options)
        differences = compared["differences"]
        arms = {
            name: {"label": name} | arm | {"difference_to_baseline": differences.get(name, {})}
            for name, arm in compared["arms"].items()
        }
        metric = "heldout_bits_per_byte"
        return plots.difference_plot(arms, "baseline", metric, METRICS[metric])

    assert "--good" in draw() and "--accent" not in draw()
    assert "--accent" in draw(sbp=0.1)
    for neutral in (draw(runs=1), draw(sbp=0.01, oracle=-0.01)):
        assert "--good" not in neutral and "--accent" not in neutral and ">oracle<" in neutral


def test_accuracy_at_chance_is_marked_in_the_table_and_absent_at_the_top(run: Path) -> None:
    text = (run / "report.html").read_text()
    top, table = text.split("<main>")
    assert "Continuation accuracy" in top and "Capital accuracy" not in top
    assert table.count('<span class="note">at chance</span>') == 2  # the capital accuracy of the baseline and of SBP


def test_variant_of_a_metric_is_shown_in_a_table_of_its_own_and_nowhere_else(run: Path) -> None:
    text = (run / "report.html").read_text()
    before, _, variants = text.partition("The same answers, scored otherwise")
    assert variants.count("Capital accuracy, raw") == 1 and "43.2" in variants.partition("</section>")[0]
    assert "Capital accuracy, raw" not in before and "arms-capital_accuracy_raw" not in text
    columns = summary_table(json.loads((run / "results.json").read_text())).columns
    assert [column.header for column in columns[2:]] == [
        "Held-out bits per byte",
        "Continuation accuracy, %",
        "Capital accuracy, %",
    ]


def test_rates_measured_otherwise_than_in_the_paper_are_not_in_its_column(run: Path) -> None:
    text = (run / "report.html").read_text()
    rows = text[text.index('<table class="rates">') :]
    rows = rows[: rows.index("</table>")]
    assert "0.9%" in rows and "3.9%" not in rows and "7.8%" not in rows  # of pair-copying, repetition and pair-irrelevance
    assert "duplicates 0.8% (200B), 0.8% (1T, 3B), 0.3% (1T, 6B), 0.7% (real); non-factual 15.1% (200B)" in text


def test_report_names_unmeasured_rates(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert "Not measured: non-factual." in text
    assert '<span class="note">not measured</span>' in text


def test_report_shows_every_filter_rule_with_its_threshold(run: Path) -> None:
    text = (run / "report.html").read_text()
    shown = text[text.index("What the filters rejected") : text.index("New wording")]
    rules = json.loads((run / "results.json").read_text())["sources"]["related"]["synthetic_quality"]["rules"]
    assert len(rules) == 9 and all(f"<strong>{name.replace('_', ' ')}</strong>" in shown for name in rules)
    assert '<data value="0.25">0.25</data>' in shown and "length" in shown and "5.0%" in shown


def test_report_counts_contaminated_documents_by_evaluation_texts(run: Path) -> None:
    text = (run / "report.html").read_text()
    table = text[text.index("<th>contaminated documents</th>") : text.index("New wording")]
    assert '<tr><th>capital</th><td><data value="216">216</data></td><td><data value="3">3</data></td></tr>' in table
    assert "<th>held-out documents alone</th>" in table


def test_report_shows_verdicts_only_with_a_judge(run: Path, tmp_path: Path) -> None:
    assert "What the judge said" not in (run / "report.html").read_text()
    text = write_report(write_run(tmp_path / "run", judge=judge_counts())).read_text()
    page = Page(text)
    shown = text[text.index("What the judge said") : text.index("What the filters rejected")]
    assert shown.count("20.3%") == 4 and "true pairs" in shown and "Is it wrong?" in shown and "<script>" not in shown
    assert [tag for tag, _ in page.tags].count("script") == 1


@pytest.mark.parametrize(
    ("gain", "meaning"),
    [
        (0.124, "+0.1240 [+0.1030, +0.1450] nats a token: so much does the seed tell the synthesizer about its partner."),
        (
            0.012,
            "+0.0120 [-0.0090, +0.0330] nats a token: the interval includes zero, so the seed explains nothing of the partner",
        ),
        (-0.05, "-0.0500 [-0.0710, -0.0290] nats a token: the seed explains nothing of the partner, and misleads."),
        (None, "Not measured: 7 pairs of test documents are fewer than 20."),
    ],
)
def test_report_says_what_the_own_seed_explains_as_its_interval_allows(
    gain: float | None, meaning: str, tmp_path: Path
) -> None:
    text = write_report(write_run(tmp_path / "run", related=relation(gain))).read_text()
    shown = text[text.index('<section id="relation">') : text.index('<section id="pairs">')]
    assert meaning in shown.replace(wording.MINUS, "-") and ("never saw" in shown) == (gain is not None)
    assert ("the seed of another pair<span" in shown) == (gain is not None)
    assert ("so much does the seed tell" in shown) == (gain == 0.124)
    if gain is not None:
        table = Page(shown[shown.index("<table") : shown.index("</table>") + 8])
        assert [value for value, _ in table.data][:3] == [3.217, 3.217 - 0.083, 3.217 + 0.083]
        assert (
            len(table.data) == 15
            and json.loads((tmp_path / "run/results.json").read_text())["sources"]["related"]["relation"]["pairs"] == 187
        )


def test_summary_table_shows_every_main_metric_of_every_arm(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    console = Console(width=90, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(results))
    shown = console.export_text().replace(wording.MINUS, "-")
    for arm in results["arms"].values():
        for name, metric in wording.main_metrics(results["metrics"]).items():
            assert wording.number(arm[name]["value"], metric).replace(wording.MINUS, "-") in shown
    assert "[-0.033, -0.009]" in shown


def test_added_arm_is_in_every_table_and_plot(tmp_path: Path) -> None:
    arms = CONFIG.arms | {"decayed": ArmConfig(recipe={"weight_decay": 1.0}, seeds=(0, 1, 2))}
    config = CONFIG.model_copy(update={"arms": arms})
    directory = write_run(tmp_path / "run", comparison(decayed=-0.1), config=config)
    text = write_report(directory).read_text()
    results = json.loads((directory / "results.json").read_text())
    assert text.startswith("<!doctype html>") and "Four arms, language models" in text
    assert text.count(">Decayed<") >= 8  # columns, ledger, and the axes and legends of plots
    assert "SBP -0.021 [-0.033, -0.009], Oracle -0.150" in text.replace(wording.MINUS, "-")
    assert "and Decayed -0.100 [-0.112, -0.088], against the repetition baseline" in text.replace(wording.MINUS, "-")
    assert '<th class="arm-3">Decayed</th><td><data value="0.6666666666666667">67%</data>' in text
    assert [line["arms"] for line in results["ledger"] if line["stage"] == "train/decayed"] == [["decayed"]]
    assert results["matched"]["final_run"].keys() == {"baseline", "sbp", "oracle", "decayed"}


def test_loss_plots_draw_held_out_losses_where_they_were_measured() -> None:
    training = [(1000 * step, 5 - step / 10) for step in range(1, 9)]
    heldout = [(4000, 4.8), (8000, 4.6)]
    curves = [plots.LossCurve(label, "#080000", training, points) for label, points in (("A", heldout), ("B", []))]
    drawn, without = plots.loss_plot("x", "T", curves), plots.loss_plot("x", "T", curves[1:])
    assert drawn.count("stroke-dasharray") == 2 and "held-out" in drawn  # the curve of A, and the legend's
    assert "stroke-dasharray" not in without and "held-out" not in without


@pytest.mark.parametrize("label", ["oracle", "baseline-tuned-seed-2", "an-arm-of-a-very-long-name-indeed-seed-2"])
def test_legend_below_a_plot_is_no_wider_than_it(label: str) -> None:
    curves = [plots.LossCurve(f"{label}-{number}", "#080000", [(8, 4.0), (16, 3.0)], [(8, 4.5)]) for number in range(6)]
    drawn = plots.loss_plot("x", "T", curves)
    legend = drawn[drawn.index('id="x-legend_1"') :]
    lefts = [float(x) for x in re.findall(r"(?:M |translate\()(-?[\d.]+)", legend)]
    (width,) = re.findall(r'viewBox="0 0 ([\d.]+) ', drawn)
    assert min(lefts) >= 0 and max(lefts) + 4 * len(curves[0].label) < float(width)  # a letter is some 5 points wide


def test_tokens_plot_draws_each_seed_thin_and_the_mean_over_common_steps_thick() -> None:
    def run(*bits: float) -> list[dict[str, Any]]:
        return [{"step": step, "tokens": 1000 * (step + 1), "bits_per_byte": value} for step, value in enumerate(bits)]

    arm = plots.ArmCurves("A", plots.arm_color(0), [run(4, 3, 2.5), run(5, 4)])  # one run ended early
    assert arm.mean().tolist() == [[1000, 4.5], [2000, 3.5]]
    drawn = plots.tokens_plot([arm])
    assert drawn.count("stroke-width: 0.7") == 2 and "var(--arm-0)" in drawn
    assert plots.tokens_plot([plots.ArmCurves("A", plots.arm_color(0), [run(4, 3)])]).count("stroke-width: 0.7") == 0


@pytest.mark.parametrize("count", [1, 3, 9])
def test_report_of_any_number_of_arms_draws_the_difference_of_each_to_the_baseline(count: int, tmp_path: Path) -> None:
    others = [name for name in CONFIG.arms if name != "baseline"]
    more = {f"arm-{index}": 0.01 * index for index in range(count - 3)}
    arms = {name: arm.model_copy(update={"enabled": count > 1 or name == "baseline"}) for name, arm in CONFIG.arms.items()} | {
        name: ArmConfig(recipe={"weight_decay": 1.0}, seeds=(0, 1, 2)) for name in more
    }
    compared = comparison(**more)
    if count == 1:
        for name in others:
            del compared["arms"][name], compared["differences"][name]
        compared["recovered_share_of_oracle"] = {}
    text = write_report(write_run(tmp_path / "run", compared, config=CONFIG.model_copy(update={"arms": arms}))).read_text()
    drawn = re.search(r'aria-label="Held-out bits per byte: differences to the baseline">.*?</svg>', text, re.DOTALL)
    assert (drawn is not None) == (count > 1)
    if drawn is not None:
        assert len(re.findall(rf">[+{wording.MINUS}]\d\.\d{{3}}<", drawn[0])) == count - 1 and ">Baseline<" in drawn[0]


def test_headline_names_many_arms_of_one_outcome_without_their_figures(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results["arms"] |= {f"sbp-{index}": results["arms"]["sbp"] | {"label": f"SBP {'abcd'[index]}"} for index in range(4)}
    (better,) = [sentence for sentence in wording.headline(results) if sentence.startswith("Better")]
    assert "bits per byte: SBP, Oracle, SBP a, SBP b, SBP c and SBP d, against the repetition baseline" in better


def test_report_draws_bits_per_byte_only_where_they_were_measured(run: Path, tmp_path: Path) -> None:
    title = 'aria-label="Held-out bits per byte of each arm against training tokens"'
    assert title in (run / "report.html").read_text()
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run/train").glob("*/manifest.json"):
        manifest = read_sealed_json(path, "rerun")
        del manifest["counts"]["validation_loss"]  # as with validation.points = 0
        write_sealed_json(path, manifest)
    assert title not in write_report(tmp_path / "run").read_text()


def test_tokens_plot_of_runs_without_a_finite_value_is_left_out() -> None:
    nothing = plots.ArmCurves("A", plots.arm_color(0), [[], [{"step": 0, "tokens": 1000, "bits_per_byte": 4.0}]])
    assert nothing.mean().tolist() == []
    arms = {"a": {"label": "A", "validation": {"curves": {"a": []}}}, "b": {"label": "B", "validation": {}}}
    assert _tokens_plot(arms) == ""


def test_reasons_for_missing_shares_are_given_once_and_only_if_no_arm_has_a_share() -> None:
    missing, share = {"value": None, "reason": "a reason"}, {"value": 0.4, "low": 0.3, "high": 0.5}
    assert wording.missing_shares({"sbp": {"m": missing}, "other": {"m": missing}}, ["m"]) == ["a reason"]
    assert wording.missing_shares({"sbp": {"m": missing}, "other": {"m": share}}, ["m"]) == []


def test_control_characters_are_shown_by_name_and_line_breaks_stay() -> None:
    template = page_environment("sbp_fast.experiment.report").from_string("{{ text }}|{{ number }}")
    shown = template.render(text="a\x07\u2067<\n\tb\u200f", number=3)
    assert shown == "a⟨U+0007⟩⟨U+2067⟩&lt;\n\tb⟨U+200F⟩|3"


def test_report_without_synthetic_arms_omits_their_sections(tmp_path: Path) -> None:
    arms = CONFIG.arms | {"sbp": CONFIG.arms["sbp"].model_copy(update={"enabled": False})}
    config = CONFIG.model_copy(update={"arms": arms})
    compared = comparison()
    for key in ("arms", "differences"):
        del compared[key]["sbp"]
    compared["recovered_share_of_oracle"] = {"oracle": {}}
    text = write_report(write_run(tmp_path / "run", compared, config=config)).read_text()
    assert "No arm of this run reads synthetic documents" in text
    assert re.findall(r'<section id="(\w+)">', text) == ["arms", "training", "ledger", "limits", "configuration"]
