"""The page of a run in a real browser, opened from disk."""

from __future__ import annotations

import os
import shutil

import pytest
from compared_runs import write_all
from report_runs import ALIGNED, HEADS, LAYERS, ranking, write_run

from hera_trainer.runs.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        executable = None
    if executable is None:
        reason = f"needs playwright (`pip install playwright`) and one of {', '.join(BROWSERS)}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    pytest.importorskip("plotly")
    return write_report(write_run(tmp_path_factory.mktemp("report"))).as_uri()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    pytest.importorskip("plotly")
    return write_report(write_all(tmp_path_factory.mktemp("comparison"))).as_uri()


@pytest.fixture
def opened(browser, address):
    """Opens the page; afterwards, nothing may have gone wrong or out to the network."""
    complaints, contexts = [], []

    def open_page(address=address, **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url == address else complaints.append(request.url[:200]))
        page.goto(address)
        page.locator(".plot .main-svg").last.wait_for()  # one after the other, in the order of the page
        return page

    yield open_page
    for context in contexts:
        context.close()
    # What the page makes itself, such as an image to save, is no network.
    assert [text for text in complaints if not text.startswith(("blob:", "data:"))] == []


def assert_scheme(page, surface, body, middle):
    """The colours of the page and its plots; they follow a change at the next frame."""
    from playwright.sync_api import expect

    for plot in page.locator(".plot").all():
        expect(plot.locator(".main-svg").first).to_have_css("background-color", surface)
    expect(page.locator("body")).to_have_css("background-color", body)
    scale = page.evaluate("document.getElementById('plot-heads-text-difference').data[0].colorscale")
    assert scale[1] == [0.5, middle]


LIGHT = ("rgb(255, 255, 255)", "rgb(246, 247, 249)", "#f4f4f4")
DARK = ("rgb(25, 29, 35)", "rgb(16, 19, 23)", "#262b32")


def place_of(page, plot, layer, head):
    """The middle of a cell of a map, on the screen."""
    area = page.locator(f"#plot-{plot} .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    return box["x"] + box["width"] * (head + 0.5) / HEADS, box["y"] + box["height"] * (layer + 0.5) / LAYERS


def test_every_plot_is_drawn(opened):
    page = opened()
    plots = page.locator(".plot")
    assert plots.count() == 14
    for i in range(plots.count()):
        drawn = plots.nth(i).locator(".heatmaplayer image, .scatterlayer path.js-line").first
        box = drawn.bounding_box()
        assert box["width"] > 100 and box["height"] >= 0
    for context in ("text", "image"):
        for name in ("before", "after", "difference"):
            plot = f"plot-heads-{context}-{name}"
            cells = page.evaluate(f"document.getElementById('{plot}').data[0].z.map(row => row.length)")
            assert cells == [HEADS] * LAYERS
            box = page.locator(f"#{plot} .heatmaplayer image").bounding_box()
            assert box["width"] > 100 and box["height"] > 100
            assert page.locator(f"#{plot} .shapelayer path").count() == 2 * len(ALIGNED)


def test_hover_names_head_and_scores(opened):
    page = opened()
    label = page.locator("#plot-heads-text-after .hoverlayer .hovertext")
    for layer, head in ((3, 2), (5, 0)):
        page.mouse.move(*place_of(page, "heads-text-after", layer, head))
        label.get_by_text(f"layer {layer}, head {head}").wait_for()
        before, after = (ranking(seed).scores[layer, head].item() for seed in (1, 61))
        assert label.text_content().replace("\N{MINUS SIGN}", "-") == (
            f"L{layer}H{head}{', aligned' if (layer, head) in ALIGNED else ''}layer {layer}, head {head}"
            f"before {before:.4f}after {after:.4f}change {after - before:+.4f}"
        )
    page.mouse.move(*place_of(page, "heads-text-after", 1, 1))
    label.wait_for(state="detached")  # a layer without heads


def test_hover_on_a_curve(opened):
    page = opened()
    area = page.locator("#plot-temperature .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    label = page.locator("#plot-temperature .hoverlayer .legend")
    label.wait_for()
    # The last point or, where the page is narrower, the one before it.
    assert label.text_content()[:2] in ("59", "60") and "0.0694" in label.text_content()


def test_plots_follow_the_colour_scheme(opened):
    page = opened(color_scheme="light")
    assert_scheme(page, *LIGHT)
    page.emulate_media(color_scheme="dark")
    assert_scheme(page, *DARK)
    page.emulate_media(color_scheme="dark", media="print")
    assert_scheme(page, *LIGHT)


def test_page_opened_in_the_dark_scheme(opened):
    assert_scheme(opened(color_scheme="dark"), *DARK)


def test_tab_key_reaches_every_control_in_order(opened):
    page = opened()
    controls = page.evaluate(
        "[...document.querySelectorAll('a[href], button, summary, body > :not(details) > .scroll')].map((e, i) => {"
        " e.dataset.order = i; return e.textContent.trim() })"
    )
    assert controls[0] == "Skip to the content" and {"SVG", "PNG"} <= set(controls)
    reached = []
    for _ in range(3 * len(controls)):
        page.keyboard.press("Tab")
        state = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.dataset.order, s.outlineStyle, parseFloat(s.outlineWidth), e === document.body] })()"
        )
        if state[3]:
            break
        assert state[1] == "solid" and state[2] >= 2  # the focus is seen
        if state[0] is not None:
            reached.append(int(state[0]))
    assert reached == list(range(len(controls)))


def test_values_open_with_the_keyboard(opened):
    page = opened()
    table = page.get_by_role("table", name="Text only, before (step 0): score of each head")
    assert table.count() == 0  # folded
    page.locator("#heads summary").first.focus()
    page.keyboard.press("Enter")
    table.wait_for()
    row = table.get_by_role("row").nth(4)
    cells = row.get_by_role("cell").all_text_contents()
    assert cells == [f"{score:.4f}" for score in ranking(1).scores[3].tolist()]


def test_skip_link_leads_past_the_navigation(opened):
    page = opened()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_narrow_screens_scroll_in_one_direction(opened):
    page = opened(viewport={"width": 320, "height": 700})
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    for width in (320, 768, 1280):
        page.set_viewport_size({"width": width, "height": 700})
        page.wait_for_timeout(500)  # plots are drawn again at their new width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tiles = "[...document.querySelectorAll('.tiles div')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert page.evaluate(tiles) == 0  # no value runs over its frame
        for plot in page.locator(".plot").all():
            drawn, given = plot.locator(".main-svg").first.bounding_box(), plot.bounding_box()
            assert drawn["width"] == pytest.approx(given["width"], abs=1)


def test_wide_screens_show_the_whole_table_of_aligned_heads(opened):
    page = opened(viewport={"width": 1280, "height": 900})
    assert page.evaluate("(e => e.scrollWidth <= e.clientWidth)(document.querySelector('#aligned .scroll'))")


def test_comparison_is_drawn_in_both_schemes(opened, comparison):
    page = opened(comparison, color_scheme="light")
    names = page.locator("#plot-loss .legendtext").all_text_contents()
    assert [name.split(" ")[0] for name in names] == ["SFT", "aligned", "control"]
    for surface, color in ((LIGHT[0], "rgb(193, 79, 0)"), (DARK[0], "rgb(255, 143, 69)")):
        page.emulate_media(color_scheme="light" if surface == LIGHT[0] else "dark")
        from playwright.sync_api import expect

        expect(page.locator("#plot-loss .main-svg").first).to_have_css("background-color", surface)
        band = page.locator("#plot-loss .scatterlayer path.js-fill").first
        expect(band).to_have_css("fill", color)
        assert 0.1 < float(band.evaluate("e => getComputedStyle(e).fillOpacity")) < 0.3
    for plot in page.locator(".plot").all():
        box, legend = plot.bounding_box(), plot.locator(".legend")
        if legend.count():  # stands above the curves and within the frame
            assert legend.bounding_box()["width"] <= box["width"]
            assert plot.locator(".nsewdrag").bounding_box()["height"] > 120


def test_comparison_on_narrow_screens(opened, comparison):
    page = opened(comparison, viewport={"width": 320, "height": 700})
    for width in (320, 768, 1280):
        page.set_viewport_size({"width": width, "height": 700})
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_plot_is_saved_as_an_image(opened, tmp_path):
    page = opened(accept_downloads=True)
    for form, magic in (("PNG", b"\x89PNG"), ("SVG", b"<svg")):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save as {form}: Text only, before (step 0)").click()
        assert download.value.suggested_filename == f"heads-text-before.{form.lower()}"
        download.value.save_as(tmp_path / form)
        assert (tmp_path / form).read_bytes().startswith(magic)
