"""HTML pages, as a parser and as a browser see them."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest

from bincomm.page.elements import POLICY

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on PATH"
)
VOID = {"meta", "link", "img"}  # tags without an end

# The page itself has no script; this reports on a copy, all of it unfolded. The contrast of a text is that of
# WCAG 2, with the nearest background that is not transparent.
SCRIPT = """addEventListener("load", () => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => {
    const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const [r, g, b] = channels(color).map(c => linear(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const background = element => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  let contrast = 21, faintest = "", texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data, element = walker.currentNode.parentElement;
    if (!text.trim() || element.closest("script") || !element.getClientRects().length) continue;
    const colors = [getComputedStyle(element).color, background(element)];
    const [light, dark] = colors.map(luminance).sort((x, y) => y - x);
    const ratio = (light + .05) / (dark + .05);
    texts += 1;
    if (ratio < contrast) [contrast, faintest] = [ratio, text];
  }
  const page = document.documentElement;
  const broken = [...document.images].filter(one => !one.naturalWidth).length;
  parent.postMessage(JSON.stringify({
    width: innerWidth, scrolled: page.scrollWidth, height: page.scrollHeight, images: document.images.length,
    broken, contrast, faintest, texts, background: background(document.body),
  }), "*");
})"""


class Page(HTMLParser):
    """A page's tags, which have to be closed, its images and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.images, self.tags, self.text = [], [], set(), ""
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


class Seen(NamedTuple):
    """What a browser says of a page."""

    width: int  # of the page, in its pixels
    scrolled: int  # its contents' width
    height: int
    images: int
    broken: int  # images that do not load
    texts: int
    contrast: float  # of the text that is hardest to read
    faintest: str  # that text
    background: str
    console: list[str]  # messages of the browser about the page


def look_at(page: Path, folder: Path, width: int, dark: bool = False) -> Seen:
    """Show a page in a frame of a width: a window cannot be as narrow as a phone.

    Args:
        page: made of `bincomm.page.elements.document`.
        folder: for copies of the page.
    """
    source = page.read_text()
    assert POLICY in source
    source = source.replace(POLICY, f"{POLICY}; script-src 'unsafe-inline'")  # for the script of this copy
    if dark:
        source = source.replace("(prefers-color-scheme: dark)", "all")
    (folder / "copy.html").write_text(source.replace("</body>", f"<script>{SCRIPT}</script></body>"))
    (folder / "frame.html").write_text(
        f'<!doctype html><link rel="icon" href="data:,"><iframe width="{width}" height="800" '
        'style="border: 0" src="copy.html"></iframe><p id="report"></p>'
        '<script>addEventListener("message", e => document.getElementById("report").textContent = e.data)'
        "</script>"
    )
    browser = subprocess.run(
        [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"),
            *("--virtual-time-budget=10000", "--dump-dom", str(folder / "frame.html")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    reported = re.search(r'<p id="report">(\{.*?\})</p>', browser.stdout, flags=re.DOTALL)
    assert reported, browser.stdout[-300:] + browser.stderr[-2000:]
    console = [line for line in browser.stderr.splitlines() if "CONSOLE" in line]
    return Seen(**json.loads(html.unescape(reported[1])), console=console)
