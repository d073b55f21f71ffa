"""The page of a report: what it says, that it loads nothing, and how it behaves in a browser, if there is one."""

import base64
import hashlib
import re
import shutil
from collections import OrderedDict
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import fewbit

EVIL = "<script>alert(1)</script>"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        parts = {"up": lambda: nn.Linear(16, 64), "act": nn.GELU, "down": lambda: nn.Linear(64, 16)}
        self.blocks = nn.ModuleList(
            nn.Sequential(OrderedDict((name, make()) for name, make in parts.items())) for _ in range(3)
        )
        self.add_module(EVIL, nn.GELU())
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(getattr(self, EVIL)(x))


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    return fewbit.memory(Net(), torch.randn(256, 16), optimizer="adamw", fake=True)


@pytest.fixture(scope="module")
def pages(report):
    budget = report.plan(4, budget=report.peak.bytes * 9 // 10)
    return {
        "report": report.to_html(),
        "plan": report.to_html(plan=report.plan(4), largest_batch=report.largest_batch("4 MiB", 4)),
        "budget": report.to_html(plan=budget),
    }


class Tags(HTMLParser):
    """Checks that elements are nested correctly."""

    EMPTY = ("meta", "link", "br", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.found, self._open = [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


@pytest.mark.parametrize("name", ["report", "plan", "budget"])
def test_names_are_escaped_and_nothing_is_loaded(pages, name):
    text = pages[name]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    tags = Tags(text).found
    assert [tag for tag, _ in tags].count("script") == 1
    assert not [tag for tag, attrs in tags if {"src", "href", "onclick", "onload"} & set(attrs)]
    assert not [word for word in ("http:", "https:", "src=", "@import", "url(") if word in text]
    (script,) = re.findall("<script>(.*)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (allowed,) = [attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert allowed == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_it_begins_with_a_sentence_the_batch_and_lines_to_paste(pages):
    for text in pages.values():
        assert "256×16" in text
        assert "parameters float32 on cpu" in text
        order = [
            text.index(part) for part in ("<h1>", 'class="verdict"', "<pre", "Kept for backward", "Peak of a training step")
        ]
        assert order == sorted(order)
    assert "Net keeps " in pages["report"]
    assert "converted with bits=4, the Net keeps " in pages["plan"]
    assert "fewbit.convert(model, bits=4)" in pages["plan"] or "plan(bits=4).convert()" in pages["plan"]
    for part in ("exact</span>", "converted</span>", "after plan.convert()", "Largest batch", "What to do", "what pays"):
        assert part in pages["plan"]
    for part in ("fits ", "The choice for each block", "All blocks alike", "Blocks mixed", "as planned"):
        assert part in pages["budget"]


def test_plain_words_for_operations(pages):
    for text in pages.values():
        assert "matrix product" in text
        assert ">Addmm<" not in text
        assert 'title="Addmm"' in text


def test_blocks_collapse(pages):
    details = [attrs for tag, attrs in Tags(pages["plan"]).found if tag == "details"]
    assert "open" in details[0]
    assert "Modules in blocks.0-2" in pages["plan"]


def test_a_model_without_a_peak():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x):
            y = self.up(x).exp()
            return y * 2 if float(y.detach().sum()) > 0 else y

    assert "not known: " in fewbit.memory(Looks(), torch.randn(2, 4)).to_html()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no chromium with a chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for each in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture
def opened(browser, pages, tmp_path):
    def open_page(name, width=800, scheme="light", script=True):
        (tmp_path / "a.html").write_text(pages[name], encoding="utf-8")
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        browser.get_log("browser")  # the earlier text
        browser.get((tmp_path / "a.html").as_uri())
        return browser

    return open_page


@pytest.mark.parametrize("width", [400, 800, 1200, 1600])
@pytest.mark.parametrize("name", ["report", "plan", "budget"])
def test_nothing_is_wider_than_the_window(opened, name, width):
    page = opened(name, width)
    page.execute_script("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_scheme(opened, scheme):
    page = opened("plan", scheme=scheme)
    colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(255, 255, 255)") == (scheme == "light")


NAMES = "return [...document.querySelector('details table').tBodies[0].rows].map((row) => row.cells[0].textContent)"
SIZES = "return [...document.querySelector('details table').tBodies[0].rows].map((row) => Number(row.cells[1].dataset.number))"


def test_tables_sort_by_a_click_and_by_keyboard(opened):
    page = opened("plan")
    module, exact, *_ = page.find_elements("css selector", "details.block table th[scope=col] button")
    names, sizes = page.execute_script(NAMES), page.execute_script(SIZES)
    module.click()
    assert page.execute_script(NAMES) == sorted(names)
    module.send_keys("\ue007")  # the enter key
    assert page.execute_script(NAMES) == sorted(names, reverse=True)
    exact.click()
    assert page.execute_script(SIZES) == sorted(sizes, reverse=True)
    exact.click()
    assert page.execute_script(SIZES) == sorted(sizes)
    assert page.execute_script("return document.querySelector('details th:nth-child(2)').ariaSort") == "ascending"


def test_blocks_open_and_close_by_keyboard(opened):
    page = opened("plan")
    first = page.find_element("css selector", "details.block summary")
    for is_open in (False, True):
        first.send_keys(" ")
        assert page.execute_script("return document.querySelector('details.block').open") is is_open


def test_it_reads_without_its_script(opened):
    page = opened("plan", script=False)
    assert not page.find_elements("css selector", "th button")
    assert "matrix product" in page.find_element("css selector", "details table").text


def test_scripts_of_others_do_not_run(opened, pages, monkeypatch):
    """Even if a script got into the page."""
    monkeypatch.setitem(pages, "broken", pages["plan"].replace("<main>", "<main><script>document.title = 'mine'</script>"))
    assert opened("broken").title == "Net: memory of training"
