"""The HTML report: what it shows, that it loads nothing, and that no name becomes markup."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from support.inspections import (
    broken,
    differences,
    empty,
    experts,
    linear,
    llama,
    numbers,
    report,
    verdict,
    without_layers,
)

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.part_costs import PartCost, read_part_costs
from qtool.inspection import Inspection, inspect
from qtool.inspection.comparison import Comparison, Difference
from qtool.inspection.deep import DeepReport
from qtool.inspection.html_report import render_html


@pytest.fixture(scope="module")
def full() -> Inspection:
    modules = llama()
    warnings = (
        "model.layers.3.mlp.up_proj: 12 scales are zero",
        "config says group_size 128, the tensors have 64",
    )
    return report(
        modules,
        deep=numbers(modules),
        against=differences(modules),
        engine=verdict(),
        warnings=warnings,
        bad_values=("model.safetensors: `model.norm.weight` holds NaN or infinity",),
    )


class Reader(HTMLParser):
    """What a page consists of; fails on an element left open."""

    VOID = {"meta", "link", "br", "input", "col", "use", "path", "circle", "rect", "line"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.data = self.data or data
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


COSTS = (
    PartCost("model.layers.10.<b>", math.nan, ("FP8",)),
    PartCost("model.layers.9.mlp", 0.25, ("FP8", "W4A16")),
    PartCost("model.layers.0.mlp", -1e-9, ("FP8",)),
)
CASES = {
    **{
        "plain": lambda: report(
            [replace(module, scheme=None) for module in llama(4)], format=None, kv_cache=None
        )
    },
    **{
        "one layer": lambda: report(llama(1)),
        "126 layers": lambda: report(llama(126)),
        "without layers": without_layers,
    },
    **{
        "empty": empty,
        "broken": broken,
        "deep without quantized": lambda: replace(empty(), deep=DeepReport((), "no manifest")),
    },
    "cost by layer": lambda: report(llama(2), by_layer=COSTS),
    **{"nothing in common": lambda: report(llama(2), against=Comparison("base", (), ("a",), ()))},
    **{
        "all equal": lambda: report(
            llama(2),
            against=Comparison(
                "base", tuple(Difference(one.name, None, 0.0) for one in llama(2)), (), ()
            ),
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_any_report_becomes_a_well_formed_page(case):
    found = CASES[case]()
    page = render_html(found)
    reader = Reader(page)
    assert page.encode("utf-8")
    assert len(json.loads(reader.data)["rows"]) == len(found.modules)


def test_the_cost_by_layer_is_a_chart_in_the_order_of_the_model():
    reader = Reader(render_html(report(llama(2), by_layer=COSTS)))
    bars = [attrs for tag, attrs in reader.tags if tag == "rect" and attrs.get("class") != "catch"]
    assert [float(bar["height"]) for bar in bars] == [0, 100, 100]  # layers 0, 9 and 10
    assert "model.layers.10.<b> FP8 NaN model.layers.9.mlp FP8, W4A16 0.25" in reader.text
    assert "b" not in {tag for tag, _ in reader.tags}


def test_costs_are_read_from_the_manifest(tiny_copy):
    entries = [{"part": each.part, "mean_kl": each.mean_kl, "schemes": []} for each in COSTS[1:]]
    entries.append({"part": "x", "mean_kl": None, "schemes": ["FP8"]})
    manifest = tiny_copy / "qtool-manifest.json"
    manifest.write_text(json.dumps({"files": {}, "evaluation": {"by_layer": entries}}))
    costs = inspect(open_checkpoint(tiny_copy)).by_layer
    assert [each.part for each in costs] == ["x", COSTS[1].part, COSTS[2].part]
    assert math.isnan(costs[0].mean_kl)
    for wrong in (3, [3], [{"part": "x"}], [{"part": "x", "mean_kl": True, "schemes": []}]):
        manifest.write_text(json.dumps({"files": {}, "evaluation": {"by_layer": wrong}}))
        assert "`by_layer`" in inspect(open_checkpoint(tiny_copy)).warnings[0]
    manifest.write_text('{"files": {}, "evaluation": 3}')
    assert read_part_costs(tiny_copy) == ()


def test_the_page_says_what_the_report_holds(full):
    reader = Reader(render_html(full))
    for text in (
        full.name,
        full.architecture,
        "compressed-tensors",
        "224 of 225 linear layers",
        "fp8",
        "not tied",
        *full.warnings,
        *full.damage,
    ):
        assert text in reader.text
    for text in (
        "vLLM 0.33 on sm_90, 8 ranks: loads",
        "V_EMULATED",
        "prefer W8A8 there",
        "meta-llama/Llama-3.1-8B",
        "output head",
        "match the manifest",
    ):
        assert text in reader.text
    assert sum(tag == "figure" and "data-map" in attributes for tag, attributes in reader.tags) == 3


@pytest.mark.parametrize(
    ("loads", "native", "text"),
    [(True, True, "loads"), (True, False, "loads, emulated"), (False, False, "refused")],
)
def test_the_verdict_is_one_of_three(loads, native, text):
    reader = Reader(render_html(report(llama(1), engine=verdict(loads=loads, native=native))))
    assert f"8 ranks: {text}" in reader.text


def test_what_was_not_asked_for_is_not_there():
    reader = Reader(render_html(report(llama(2))))
    assert [
        attributes["data-map"] for tag, attributes in reader.tags if "data-map" in attributes
    ] == ["Bits per weight"]
    assert not any(
        text in reader.text for text in ("Furthest from", "Codes and scales", "vLLM", "warning")
    )


def test_nothing_is_loaded_from_anywhere(full):
    page = render_html(full)
    for _, attributes in Reader(page).tags:
        for key in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            assert re.match(r"#|data:,|$", attributes.get(key) or ""), attributes
    assert not re.search(r"url\(|@import|\bimport\(|\bfetch\(|XMLHttpRequest", page)
    policy = next(
        attributes["content"]
        for _, attributes in Reader(page).tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )


def test_hostile_names_stay_text():
    page = render_html(broken())
    reader = Reader(page)
    assert "<img" not in page and "onerror" not in {
        key for _, attributes in reader.tags for key in attributes
    }
    assert "9359" not in page
    assert sum(tag == "script" for tag, _ in reader.tags) == 2
    assert json.loads(reader.data)["rows"][0][0].startswith(
        "a</script><img src=x onerror=alert(1)>\"'&amp;"
    )


def test_twelve_thousand_modules_make_a_small_page():
    modules = experts()
    page = render_html(report(modules, deep=numbers(modules), against=differences(modules)))
    assert len(modules) > 12_000
    assert len(page.encode()) < 3e6
    assert "87 modules" in page


def test_names_made_to_blow_up_the_page_do_not():
    modules = [
        linear(f"layers.{index}.k{index}", (8, 8), "W4A16", layer=index) for index in range(12_000)
    ]
    assert len(render_html(report(modules)).encode()) < 4.5e6


def test_the_bundled_model_has_a_page(tiny_model):
    reader = Reader(render_html(inspect(open_checkpoint(tiny_model))))
    assert "None of its 42 linear layers is quantized" in reader.text
    assert "not quantized" in reader.text and "embed_tokens" in reader.text


# From here on in a browser.


@pytest.fixture
def load(browser, tmp_path):
    """A function that opens a report's page; whatever the browser complains of or asks for beyond
    the file fails the test.
    """
    complaints: list[str] = []

    def open_page(inspection, **context):
        file = tmp_path / "page.html"
        file.write_text(render_html(inspection), encoding="utf-8")
        page = browser.new_context(**context).new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"page error: {error}"))
        page.on(
            "request",
            lambda request: (
                request.url in (file.as_uri(), "data:,")
                or complaints.append(f"request: {request.url}")
            ),
        )
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in browser.contexts:
        context.close()
    assert complaints == []


def first_column(page) -> list[str]:
    return page.locator("#modules tbody td:first-child").all_inner_texts()


def test_a_browser_shows_it_without_complaint(load, full):
    page = load(full)
    for text in (
        full.name,
        "Layer by layer",
        "Furthest from meta-llama/Llama-3.1-8B",
        "config says group_size 128",
    ):
        assert page.get_by_text(text).first.is_visible()
    assert page.locator("[data-map='Bits per weight'] td").first.is_visible()


def test_pointing_and_tabbing_show_a_tooltip(load, full):
    page = load(full)
    tip = page.get_by_role("tooltip")
    page.locator("[data-map='Error'] tbody td").nth(5).hover()
    assert (
        "model.layers.5.self_attn.q_proj" in tip.inner_text()
        and "W4A16, 4,096 × 4,096" in tip.inner_text()
        and "SQNR" in tip.inner_text()
    )
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.locator("[data-map='Error'] td[tabindex='0']").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "model.layers.1.self_attn.k_proj" in tip.inner_text()


def test_the_list_filters_and_sorts(load, full):
    page = load(full)
    page.locator("#all summary").click()
    assert len(first_column(page)) == 200
    page.locator("#more").click()
    assert len(first_column(page)) == 225
    page.locator("#filter").fill(".12. PROJ")
    assert len(first_column(page)) == 7
    page.get_by_role("button", name="bytes").click()
    assert first_column(page)[0].endswith(("k_proj", "v_proj"))
    page.get_by_role("button", name="bytes").click()
    assert first_column(page)[0].endswith(("gate_proj", "up_proj", "down_proj"))
    assert page.locator("th[aria-sort='descending']").inner_text().startswith("bytes")
    page.locator("#filter").fill("")
    page.get_by_role("button", name="SQNR, dB").click()
    assert first_column(page)[0] == full.against.modules[0].name
    page.locator("#filter").fill("no such thing")
    assert first_column(page) == [] and page.locator("#matches").inner_text() == "0 of 225"


def test_a_field_of_the_map_opens_its_modules(load):
    page = load(report(experts(4, 8)))
    page.locator("tr", has=page.get_by_role("rowheader", name="experts gate_proj")).locator(
        "td"
    ).nth(3).click()
    assert first_column(page) == [
        f"model.layers.3.mlp.experts.{expert}.gate_proj" for expert in range(8)
    ]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("width", "case"),
    [
        *((width, "full") for width in (400, 800, 1600)),
        *((400, case) for case in ("experts", "broken", "126 layers")),
    ],
)
def test_the_page_is_never_wider_than_the_window(load, full, width, case):
    found = (
        full if case == "full" else report(experts(46, 2)) if case == "experts" else CASES[case]()
    )
    page = load(found, viewport={"width": width, "height": 900})
    if found.modules:
        page.locator("#all summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_scripts_the_numbers_are_there(load, full):
    page = load(full, java_script_enabled=False)
    assert page.locator("[data-map='Error'] tbody td").nth(5).is_visible()
    page.locator("#all summary").click()
    assert page.locator("noscript p").is_visible()
    assert not page.locator("#filter").is_visible()


def test_hostile_names_do_nothing_in_a_browser(load):
    page = load(broken())
    page.locator("#all summary").click()
    for cell in page.locator("table.heat td[data-tip]").all():
        cell.hover()
    assert page.locator("img").count() == 0
    assert "onerror" in page.locator("#modules").inner_text()
