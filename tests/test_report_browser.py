"""Pages of reports in a headless browser: nothing is fetched, nothing overflows, a pointer is answered, rows can be hidden.

Needs the extra ``browser`` and a browser: Chromium of the system, or ``playwright install chromium``.
"""

import pytest
from report_records import full_experiment

from recbole_fedkd.report import write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(full_experiment(tmp_path_factory.mktemp("pages") / "grid"))


@pytest.fixture(params=[(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")], ids=str)
def page(browser, report, request):
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda asking: asked.append(asking.url))
    opened.goto(report.as_uri())
    yield opened
    assert said == [], "the page complains"
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == [], "another host is asked"
    context.close()


def test_pages_fit_their_screen_and_the_overview_a_wide_one(page):
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    overview = page.locator(".scroll").first
    if width == 1280:
        assert overview.evaluate("each => each.scrollWidth <= each.clientWidth")
    # What is drawn over the paper is no colour of its own.
    check_ink(page)


INK = """() => [...document.querySelectorAll('svg text')].filter(
    each => getComputedStyle(each).fill !== getComputedStyle(document.body).color).map(each => each.textContent)"""


def check_ink(page):
    """All letters of plots have the colour of the page's."""
    assert page.locator("svg text").count() and page.evaluate(INK) == []


def test_a_runs_own_page_is_readable_in_the_dark(browser, run):
    opened = browser.new_context(color_scheme="dark").new_page()
    opened.goto(write_report(run(strategy="fedavg")["run_folder"]).resolve().as_uri())
    check_ink(opened)
    opened.context.close()


def test_a_pointer_near_a_point_is_told_what_it_is(page):
    picture = page.locator(".picture").first
    picture.scroll_into_view_if_needed()
    place = picture.evaluate(
        """each => { const [x, y, row, text] = JSON.parse(each.dataset.points)[1]; const svg = each.querySelector("svg");
                     const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM()); return [at.x, at.y, text]; }"""
    )
    told = page.locator("#told")
    assert not told.is_visible()
    page.mouse.move(place[0] + 2, place[1])
    assert told.text_content() == place[2] and told.is_visible()
    page.mouse.move(2, 2)
    assert not told.is_visible()


def test_a_row_can_be_hidden_and_shown_again(page):
    button = page.locator(".legend button").nth(2)
    name = button.get_attribute("data-name")
    section = page.locator("section").first
    line = section.locator("tr").filter(has=page.locator(f'th[scope="row"]:text-is("{name}")')).first
    drawn = section.locator('svg [data-row="2"]').first
    assert line.is_visible() and "hidden" not in (drawn.get_attribute("class") or "")
    button.click()
    assert not line.is_visible() and "hidden" in drawn.get_attribute("class")
    button.click()
    assert line.is_visible() and "hidden" not in drawn.get_attribute("class")
