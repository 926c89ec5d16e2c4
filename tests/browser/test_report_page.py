"""Reports of made-up studies, opened in a real browser."""

import itertools
import re

import pytest

from pftools import report
from tests.browser.conftest import STUDIES, keep

WIDTHS = (360, 1280, 1600)


class Opened:
    """A page, with everything that it said to the console and asked for."""

    def __init__(self, browser, path, width=1280, **options):
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            self.page.wait_for_selector("html[data-ready]", state="attached", timeout=120_000)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def count(self, selector):
        return self.page.locator(selector).count()

    def ask(self, script, argument=None):
        return self.page.evaluate(script, argument)


@pytest.mark.parametrize("name", STUDIES)
def test_a_report_is_quiet_alone_and_as_wide_as_the_screen(browser, reports, name):
    _, path = reports[name]
    for width in WIDTHS:
        with Opened(browser, path, width) as opened:
            assert opened.said == [] and opened.asked == [path.as_uri()]
            assert opened.ask("document.documentElement.scrollWidth") <= width
            figures = opened.count("figure[data-says]")
            assert figures and opened.count("figure.live") == figures
            outside = """[...document.querySelectorAll('.chart svg, .key, .matrices, nav')].filter(
                part => part.getBoundingClientRect().right > innerWidth + 1).length"""
            assert opened.ask(outside) == 0
            keep(opened.page, f"{name}-{width}", whole=True)


def test_the_first_screen_has_answer_doubt_cost_and_the_main_chart(browser, reports):
    _, path = reports["finished"]
    with Opened(browser, path) as opened:
        seen = """[...document.querySelectorAll('.first blockquote, .first figure, .first > div > *')].map(
            part => part.getBoundingClientRect().bottom)"""
        assert max(opened.ask(seen)) <= 800
        keep(opened.page, "first-screen")
        said = opened.page.locator(".first").inner_text()
        assert "95% confidence" in said and "steps took" in said


MARKS = "figure[aria-label^='Perplexity'] .chart .mark-symbol path"


def test_a_mark_an_entry_and_the_key_switches_an_ordering_off_everywhere(browser, reports):
    results, path = reports["finished"]
    entries = report.entry_table(results)
    (best,) = [found for found in report.best_sets(results) if found.metric == "perplexity"]
    marks = 2 * (len(entries) + len(best.members))  # in two charts; a ring around each that may be best
    with Opened(browser, path) as opened:
        assert opened.count(MARKS) == marks and "prune" not in best.members
        key = opened.page.locator(".key button[data-ordering=prune]")
        key.click()
        assert key.get_attribute("aria-pressed") == "false"
        opened.page.wait_for_function(f'document.querySelectorAll("{MARKS}").length == {marks - 2}')
        rows = opened.page.locator("table.orderings").first.locator("tbody tr:visible")
        assert rows.count() == len(entries) - 1
        assert opened.page.locator(".matrix tbody tr:visible").count() == 2
        opened.page.locator(".key .all").click()
        opened.page.wait_for_function(f'document.querySelectorAll("{MARKS}").length == {marks}')
        assert rows.count() == len(entries)


def test_marks_stand_where_their_numbers_are(browser, reports):
    results, path = reports["eighty"]
    with Opened(browser, path) as opened:
        found = opened.ask("""() => {
            const chart = document.querySelectorAll('.chart')[1];
            const centre = part => { const b = part.getBoundingClientRect(); return (b.left + b.right) / 2; };
            const ticks = [...chart.querySelectorAll('.role-axis-label text')]
                .filter(t => /^\\d+%$/.test(t.textContent))
                .map(t => [parseInt(t.textContent) / 100, centre(t)]);
            const marks = [...chart.querySelectorAll('.mark-symbol path')]
                .map(m => [m.getAttribute('aria-label'), centre(m)]);
            return [ticks, marks];
        }""")
    ticks, marks = dict(map(tuple, found[0])), found[1]
    pixels = (ticks[0.7] - ticks[0.0]) / 0.7
    assert len(marks) > 60
    for label, x in marks:
        measured = float(re.search(r"measured sparsity: ([\d.]+)%", label).group(1)) / 100
        assert abs(ticks[0.0] + pixels * measured - x) < 2, label


NAMES = """labels => [...document.querySelectorAll("figure[aria-label^='Perplexity against'] .chart")].map(
    chart => [...chart.querySelectorAll('.mark-text text')].filter(t => labels.includes(t.textContent)).map(
        t => {
            const box = t.getBoundingClientRect();
            return [t.textContent, box.left, box.top, box.right, box.bottom];
        }))"""


def test_lines_carry_their_names_where_there_is_room(browser, reports):
    for name in ("eighty", "seeds"):
        results, path = reports[name]
        labels = sorted(set(report.entry_table(results)["label"]))
        # Right of these two are the marks of all others.
        named = [label for label in labels if name != "eighty" or label not in ("base", "finetune")]
        with Opened(browser, path, 1600) as opened:
            charts = opened.ask(NAMES, labels)
            assert [sorted(word for word, *_ in chart) for chart in charts] == 2 * [named]
            for chart in charts:
                for (_, *one), (_, *other) in itertools.combinations(chart, 2):
                    beside = one[2] <= other[0] or other[2] <= one[0]
                    assert beside or one[3] <= other[1] + 2 or other[3] <= one[1] + 2, (one, other)
                assert all(right <= 1600 for *_, right, _ in chart)
        with Opened(browser, path, 360) as opened:
            assert opened.ask(NAMES, labels) == [[], []]


def test_tips_tell_what_a_mark_and_a_cell_are(browser, reports):
    _, path = reports["finished"]
    with Opened(browser, path) as opened:
        mark = opened.page.locator(MARKS).first
        mark.scroll_into_view_if_needed()
        mark.hover(force=True)
        opened.page.wait_for_selector(".tip:visible")
        assert "perplexity" in opened.page.locator(".tip").inner_text()
        cell = opened.page.locator(".matrix td[data-says]").first
        cell.scroll_into_view_if_needed()
        cell.hover()
        opened.page.wait_for_function("document.querySelector('.tip').textContent.includes('corrected p')")
        opened.page.keyboard.press("Escape")
        assert opened.page.locator(".tip").is_hidden()


def test_tables_sort_and_filter(browser, reports):
    _, path = reports["seeds"]
    with Opened(browser, path) as opened:
        table = opened.page.locator("table.orderings").first
        column = table.locator("thead th").all_inner_texts().index("perplexity")
        values = lambda: [  # noqa: E731
            float(text.split()[0].replace(",", ""))
            for text in table.locator(f"tbody tr:visible td:nth-child({column + 1})").all_inner_texts()
        ]
        before = values()
        head = table.locator("thead th").nth(column)
        head.locator("button").click()
        assert values() == sorted(before) and head.get_attribute("aria-sort") == "ascending"
        head.locator("button").click()
        assert values() == sorted(before, reverse=True)
        opened.page.locator(".choose").first.get_by_label("method").select_option("wanda")
        assert 0 < len(values()) < len(before)


def test_a_verdict_matrix_has_a_cell_for_each_side_of_a_pair(browser, reports):
    results, path = reports["seeds"]
    pairs = report.pair_table(results)
    with Opened(browser, path) as opened:
        said = opened.page.locator(".matrix td[data-says]").evaluate_all(
            "cells => cells.map(c => c.dataset.says)"
        )
        assert sorted(said) == sorted(2 * pairs["verdict"].tolist())
        unsure = opened.page.locator(".matrix td.unsure")
        assert unsure.count() == 2 * int((pairs["verdict_kind"] == "cannot be told apart").sum())
        for cell in unsure.all():
            assert "gradient" in cell.evaluate("cell => getComputedStyle(cell).backgroundImage")


CONTRAST = """within => {
  const light = ([r, g, b]) => [r, g, b].map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const parse = text => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith('color(') ? numbers.slice(0, 4) : numbers.map((v, at) => at < 3 ? v / 255 : v);
  };
  const ground = part => {
    for (let at = part; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [1, 1, 1];
  };
  const poor = [];
  for (const whole of document.querySelectorAll(within)) {
   const walker = document.createTreeWalker(whole, NodeFilter.SHOW_TEXT);
   while (walker.nextNode()) {
    const part = walker.currentNode.parentElement;
    const words = walker.currentNode.textContent.trim();
    if (!words || !part.checkVisibility() || part.closest('script, style, select')) continue;
    const style = getComputedStyle(part);
    const colour = parse(part.closest('svg') ? style.fill : style.color);
    const [one, two] = [light(colour), light(ground(part))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (two + 0.05);
    if (ratio < 4.5) poor.push([part.tagName, words.slice(0, 40), ratio.toFixed(2)]);
   }
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_light_and_in_dark(browser, reports, scheme):
    for name in ("finished", "seeds"):
        with Opened(browser, reports[name][1], color_scheme=scheme) as opened:
            assert opened.ask(CONTRAST, "body") == []
            if scheme == "dark":
                keep(opened.page, f"{name}-dark", whole=True)


def test_everything_has_a_name_for_readers_who_listen(browser, reports):
    for name in STUDIES:
        results, path = reports[name]
        with Opened(browser, path) as opened:
            assert opened.count("h1:not([id]), h2:not([id]), h3:not([id])") == 0
            ids = opened.ask("[...document.querySelectorAll('[id]')].map(part => part.id)")
            assert len(ids) == len(set(ids))
            assert opened.count("thead th:not([scope])") == 0
            assert (
                opened.count("figure:not([role]), figure:not([aria-label]), figure[aria-label='Chart']") == 0
            )
            told = opened.ask("[...document.querySelectorAll('figure')].map(f => f.dataset.says)")
            assert all(told)
        sets = [found for found in report.best_sets(results) if found.metric == "perplexity"]
        if sets:
            assert report.answers.compare.set_in_words(sets[0]) in told[0]


def test_on_paper_nothing_is_folded_and_without_a_script_the_drawings_stand(browser, reports):
    _, path = reports["seeds"]
    with Opened(browser, path) as opened:
        folded = opened.count("details:not([open])")
        assert folded
        opened.page.emulate_media(media="print")
        opened.page.wait_for_function("!document.querySelector('details:not([open])')")
        assert opened.page.locator(".drawing svg").first.is_visible()
        assert not opened.page.locator(".chart").first.is_visible()
        keep(opened.page, "seeds-print", whole=True)
        opened.page.emulate_media(media="screen")
        opened.page.wait_for_function(f"document.querySelectorAll('details:not([open])').length == {folded}")
    with Opened(browser, path, java_script_enabled=False) as opened:
        assert opened.page.locator(".drawing svg").first.is_visible()
        assert not opened.page.locator(".key").is_visible()


def test_what_is_missing_or_failed_is_named_where_its_row_would_be(browser, reports):
    for name, words in {
        "half": "has not begun",
        "failed": "failed in cell 5: OutOfMemoryError: 12 GiB <asked>",
    }.items():
        with Opened(browser, reports[name][1]) as opened:
            under = opened.page.locator("#the-orderings ~ .wide, h2#the-orderings ~ div").all_inner_texts()
            assert words in " ".join(under) or words in opened.page.locator("main").inner_text()
            assert "3 of 4 results are finished" in opened.page.locator(".first").inner_text()


def test_eighty_rows_are_small_and_open_at_once(browser, reports):
    results, path = reports["eighty"]
    assert len(results) >= 66 and path.stat().st_size < 3_000_000
    with Opened(browser, path) as opened:
        assert opened.count(".matrix") == 8 and opened.said == []
