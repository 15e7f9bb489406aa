"""The report in a real browser: phone and desktop, light and dark. Screenshots go to build/screenshots."""

from __future__ import annotations

import io

import pytest

from benchmarks import record, report
from tests.benchmarks import browser

SECTIONS = {
    "side-by-side", "summary", "photograph", "speed", "roofline", "memory", "live-taps", "cases", "overhead",
    "how-to-read",
}  # fmt: skip
SCREENSHOTS = record.ROOT / "build" / "screenshots"
WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}

pytestmark = pytest.mark.skipif(
    browser.executable() is None, reason="there is no Chromium: install the package chromium, or playwright's"
)


@pytest.fixture(scope="module")
def chromium():
    with browser.launched() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(measured, tmp_path_factory):
    """Two records: a short run, and the newest one of a CPU that is committed."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.render([*record.committed("cpu")[:1], measured]))
    return path


@pytest.fixture(params=[(w, s) for w in WIDTHS for s in ("light", "dark")], ids=lambda p: "-".join(p))
def shown(request, chromium, page):
    """The browser with the page, in each window and colour scheme."""
    width, scheme = request.param
    chromium.open(page, *WIDTHS[width], scheme)
    chromium.name = f"report-{width}-{scheme}"
    return chromium


def test_nothing_goes_wrong_and_nothing_is_fetched(shown, page):
    assert shown.errors() == []
    assert shown.requests() == [page.as_uri()]


def test_the_page_does_not_scroll_sideways(shown):
    wide = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')"
    assert shown.evaluate(f"{wide} && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)") == []
    assert shown.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_rows_of_tables_are_no_columns_of_letters(shown):
    tall = "[...document.querySelectorAll('tbody tr')].filter(r => r.getBoundingClientRect().height > 240)"
    assert shown.evaluate(f"{tall}.map(r => r.textContent)") == []


def test_every_section_is_visible(shown):
    visible = (
        "[...document.querySelectorAll('section')].filter(s => s.getBoundingClientRect().height > 20 && "
        "s.getBoundingClientRect().width > 200).map(s => s.dataset.name)"
    )
    assert set(shown.evaluate(visible)) == SECTIONS


def test_text_can_be_read(shown):
    """Contrast by WCAG: 4.5 to 1 of text to its background."""
    poor = """
    (() => {
      const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
      const parse = (text) => text.match(/[\\d.]+/g).map(Number);
      const background = (e) => {
        for (; e; e = e.parentElement) {
          const found = parse(getComputedStyle(e).backgroundColor);
          if (found.length < 4 || found[3] > 0) return found;
        }
        return [255, 255, 255];
      };
      const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
      const texts = [...document.querySelectorAll("body *")].filter((e) => own(e) && !e.closest("svg, script"));
      return [...new Set(texts.filter((e) => {
        const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(background(e))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05) < 4.5;
      }).map((e) => e.className + ": " + e.textContent.slice(0, 40)))];
    })()
    """
    assert shown.evaluate(poor) == []


def test_the_screenshot_follows_the_colour_scheme(shown):
    from PIL import Image

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    picture = shown.screenshot()
    (SCREENSHOTS / f"{shown.name}.png").write_bytes(picture)
    with Image.open(io.BytesIO(picture)) as image:
        assert image.width == WIDTHS["phone" if "phone" in shown.name else "desktop"][0]
        corner = sum(image.convert("RGB").getpixel((2, 2))) / 3
    assert corner > 200 if shown.name.endswith("light") else corner < 60


def test_a_click_on_a_heading_sorts(chromium, page):
    chromium.open(page, *WIDTHS["desktop"], "light")
    column = "[...t.tHead.rows[0].cells].findIndex(c => c.textContent === 'ratio')"
    shown = (
        f"(() => {{ const t = document.querySelector('section[data-name=cases] table.sortable'), i = {column}; "
        "t.tHead.rows[0].cells[i].click(); "
        "return [...t.tBodies[0].rows].map(r => Number(r.cells[i]?.dataset.v)).filter(v => !isNaN(v)); })()"
    )
    falling, rising = chromium.evaluate(shown), chromium.evaluate(shown)
    assert len(falling) > 20
    assert falling == sorted(falling, reverse=True)
    assert rising == sorted(rising)
    assert chromium.errors() == []
