"""The site: it builds strictly, its pages hold what the package declares, and a browser asks nobody else for anything.

Needs the extra ``docs``, and for the browser ``browser``.
"""

import html
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_fedkd.config.choices import shipped
from recbole_fedkd.config.files import PROPERTIES
from recbole_fedkd.config.keys import read_keys
from recbole_fedkd.federated.strategy import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("material", reason="the extra 'docs' is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; broken links, anchors and pages in no menu are errors, of which ``--quiet`` would count none."""
    folder = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def text_of(page):
    """What a page says, without its tags."""
    article = re.search(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.S)
    return html.unescape(re.sub(r"<[^>]+>", "", article[0]))


def test_every_key_stands_on_the_page_of_keys_with_its_sentence(site):
    said = " ".join(text_of(site / "reference/keys.html").split()).replace("`", "")
    for name, key in read_keys(PROPERTIES / "overall.yaml").items():
        assert f"{name} " in said and " ".join(key.sentence.replace("`", "").split()) in said, name


def test_every_strategy_has_its_equations_and_every_preset_its_file(site):
    said = text_of(site / "equations.html")
    page = (ROOT / "docs/equations.md").read_text()
    assert all(f"--strategy={name}" in said for name in STRATEGIES)
    assert [name for name in STRATEGIES if f"\n## {name}\n" not in page] == []
    presets = text_of(site / "reference/presets.html")
    assert all(sentence in presets for sentence in shipped()["presets"].values())


def test_what_github_draws_is_drawn(site):
    for page in site.rglob("*.html"):
        code = page.read_text(encoding="utf-8")
        assert 'class="mermaid"' not in code and "```" not in text_of_safe(code), page.name
        assert not re.search(r"<p>[^<]*\n(?:- |\d+\. |\| )", code), f"{page.name}: a list or table that is none"
    assert (site / "architecture.html").read_text().count("<rect") > 20
    equations = (site / "equations.html").read_text()
    assert equations.count("<math") > 30
    assert not re.search(r"</p>\s*<span>", equations), "an equation stands outside of its paragraph"


def text_of_safe(code):
    """The text of an article outside blocks of code."""
    article = re.search(r"<article.*?</article>", code, re.S)
    return re.sub(r"<pre.*?</pre>", "", article[0], flags=re.S) if article else ""


def test_no_page_names_a_script_style_or_picture_of_another_host(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(https?:[^\" >]+)", page.read_text("utf-8")
        )
        assert loaded == [], page.name


SCREENS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]


@pytest.fixture(params=SCREENS[::3], ids=str)
def page(browser, site, request):
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda asking: asked.append(asking.url))
    opened.site = site
    yield opened
    context.close()
    assert said == [], "a page complains"
    assert [url for url in asked if not url.startswith(("file:", "data:", "about:", "blob:"))] == [], (
        "another host is asked"
    )


# Of the paper and of what is written on it, 0 to 255; a faint ink is one over the paper.
BRIGHTNESS = """() => {
  const channels = name => getComputedStyle(document.querySelector(name)).color.match(/[\\d.]+/g).map(Number);
  const paper = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const [r, g, b, share = 1] = channels("article p");
  const mean = ([r, g, b]) => (r + g + b) / 3;
  return [mean(paper), share * mean([r, g, b]) + (1 - share) * mean(paper)];
}"""


@pytest.mark.parametrize("page", SCREENS, indirect=True, ids=str)
def test_pages_fit_their_screen_and_are_read_in_light_and_in_the_dark(page):
    for name in (
        "index",
        "quick-start",
        "equations",
        "reference/keys",
        "reference/python",
        "architecture",
        "choose",
        "from-frame-to-report",
    ):
        page.goto((page.site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"], name
        paper, ink = page.evaluate(BRIGHTNESS)
        dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        assert (paper < 60 and ink > 150) if dark else (paper > 200 and ink < 100), (name, paper, ink)
        if page.viewport_size["width"] == 1280 and name == "choose":
            cut = "[...document.querySelectorAll('.md-typeset__scrollwrap')].some(each => each.scrollWidth > each.clientWidth)"
            assert not page.evaluate(cut), "a decision table is cut"


def test_the_search_finds_a_key_from_a_folder(page):
    page.goto((page.site / "index.html").as_uri())
    if page.viewport_size["width"] < 1000:
        page.locator("label[for=__search]").first.click()
    page.locator("input.md-search__input").click()
    page.keyboard.type("server_tau", delay=20)
    found = page.locator(".md-search-result__link").first
    found.wait_for(state="visible")
    links = page.locator(".md-search-result__link").evaluate_all("all => all.map(each => each.href)")
    assert any("reference/keys.html" in link for link in links), links


def test_a_link_leads_from_page_to_page(page):
    page.goto((page.site / "choose.html").as_uri())
    page.locator("article a", has_text="privacy").first.click()
    page.wait_for_url("**/privacy.html*")
    assert "rivacy" in page.locator("h1").first.text_content()


def test_the_rooms_are_drawn_below_one_another(site):
    """An arrow leads down, from whoever imports."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/hooks/pictures.py")
    sys.path.insert(0, str(ROOT / "docs/hooks"))
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    sys.path.remove(str(ROOT / "docs/hooks"))
    drawn = pictures.rooms("graph TD\n  a --> b\n  b --> c\n  a --> d\n")
    places = {name: float(y) for y, name in re.findall(r'<text x="[\d.]+" y="([\d.]+)">(\w+)', drawn)}
    assert places["a"] < places["b"] < places["c"] and drawn.count("marker-end") == 3 and places["d"] > places["a"]
