"""The page in a real browser: a prompt typed, tokens and blocks seen, the slider moving the budget, nothing broken."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from dspark_server import __version__
from dspark_server.api import feed

from .browser import browsing
from .support import Running, serving

PROMPT = "Once upon a time"
COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens_total{}",
    "generation_tokens": "vllm:generation_tokens_total{}",
    "drafts": "vllm:spec_decode_num_drafts_total{}",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens_total{}",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens_total{}",
    "skipped": 'dspark:draft_decisions_total{decision="skipped"}',
}

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as opened:
        yield opened


@pytest.fixture(autouse=True)
def every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model takes more steps in a tenth of a second than the feed would show."""
    monkeypatch.setattr(feed, "MAX_BLOCKS", 1000)


@pytest.fixture
def open_page(browser: Browser, server: Running) -> Iterator[Open]:
    """Opens the page; at the end of the test nothing may have complained."""
    complaints: list[str] = []
    contexts = []

    def opens(path: str = "/", *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        scheme: Any = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith(server.url) else complaints.append(request.url)
        )
        page.goto(server.url + path)
        if path == "/":
            expect(page.locator("#status")).to_have_text("live")
        return page

    yield opens
    for context in contexts:
        context.close()
    assert complaints == []


def test_the_api_page_needs_nothing_from_elsewhere(open_page: Open) -> None:
    page = open_page("/docs", width=400, dark=True)
    expect(page.locator("h1")).to_have_text("HTTP API")
    expect(page.locator("td", has_text="POST /v1/chat/completions").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def value(page: Page, name: str) -> float:
    """A tile's number, -1 if it shows none."""
    text = page.locator(f"#{name}").inner_text()
    return float(text) if re.fullmatch(r"[\d.]+", text) else -1


def until(page: Page, condition: Callable[[], bool], seconds: float = 20) -> None:
    """Playwright's own wait_for_function evaluates a string, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        page.wait_for_timeout(50)


def test_a_typed_prompt_streams_and_shows_its_blocks(open_page: Open, server: Running) -> None:
    page = open_page()
    expected = server.complete(PROMPT, max_tokens=64).json()["choices"][0]["text"]
    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_label("Prompt", exact=True).type(PROMPT)
    page.get_by_label("Length").select_option("64")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.locator("#speed")).to_contain_text("64 tokens")
    assert page.locator("#answer").evaluate("element => element.textContent") == expected
    blocks = page.locator("#blocks li")
    gained = [int(text) for text in blocks.locator(".step b").all_inner_texts()]
    assert sum(gained) == 64
    assert blocks.locator(".cell.accepted, .cell.rejected, .cell.unverified").count() > 10
    assert blocks.locator(".cell small").first.inner_text().isdigit()
    expect(page.locator("#sps .chosen")).to_have_count(1)
    expect(page.locator("#sps-note")).to_contain_text("Policy causal")
    expect(page.locator("#acceptance .bar")).not_to_have_count(0)
    page.get_by_role("slider").press("ArrowRight")  # the last step of a request has no draft, and so no curve
    expect(page.locator("#sps .theta")).to_have_count(1)
    page.get_by_role("slider").press("Home")


def test_the_slider_moves_the_budget_and_the_counters_are_those_of_metrics(open_page: Open, server: Running) -> None:
    server.settle()  # a token of another test's request would count here, and not on the page
    before = server.metrics()
    page = open_page()
    slider = page.get_by_role("slider", name="Background requests")
    slider.focus()
    slider.press("ArrowRight")
    expect(page.locator("#running")).to_have_text("1")
    until(page, lambda: value(page, "budget") > 2)
    alone = value(page, "budget")
    slider.press("End")
    expect(page.locator("#load-value")).to_have_text("16")
    until(page, lambda: value(page, "running") > 12)
    until(page, lambda: 1 <= value(page, "budget") < alone - 0.5)
    assert value(page, "each") > 0 and value(page, "total") > value(page, "each")
    expect(page.locator("#history .budget")).not_to_have_count(0)
    slider.press("Home")
    expect(page.locator("#running")).to_have_text("0")
    server.settle()
    after = server.metrics()
    for name, series in COUNTERS.items():
        expect(page.locator(f"#counter-{name}")).to_have_text(f"{after[series] - before[series]:,.0f}")


def test_policy_and_drafter_are_picked(open_page: Open, server: Running) -> None:
    page = open_page()
    assert page.get_by_label("Selection policy").locator("option").all_inner_texts() == [
        "causal",
        "lagged",
        "fixed",
        "threshold",
        "none",
    ]
    page.get_by_label("Selection policy").select_option("fixed")
    page.get_by_label("Length").select_option("64")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#speed")).to_contain_text("64 tokens")
    assert page.locator("#blocks .cell.unverified").count() == 0
    expect(page.locator("#sps-note")).to_contain_text("Policy fixed")
    page.get_by_label("Drafter").select_option("none")
    expect(page.get_by_label("Selection policy")).to_be_disabled()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#blocks .cell.plain")).to_have_count(64)
    expect(page.locator("#blocks .cell")).to_have_count(64)


def test_domains_bring_their_prompts(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("radio", name="code").focus()
    page.keyboard.press("Space")
    expect(page.locator("#samples button")).to_have_count(6)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(re.compile("Fibonacci"))
    page.locator("#samples button").nth(1).click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(re.compile("class Stack"))


def test_the_keyboard_reaches_everything(open_page: Open) -> None:
    page = open_page()
    reached: list[str] = []
    for _ in range(48):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('href')"))
    wanted = [
        "/docs",
        "prompt",
        "temperature",
        "length",
        "run",
        "answer",
        "blocks",
        "load",
        "policy",
        "drafter",
        "/metrics",
    ]
    assert list(dict.fromkeys(name for name in reached if name in wanted)) == wanted
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, select, textarea, button")]
        .filter(e => !(e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_version_base_url_and_api_reference_are_on_the_page(open_page: Open, server: Running) -> None:
    page = open_page()
    expect(page.locator("#version")).to_have_text(__version__)
    expect(page.locator("#base-url")).to_have_text(f"{server.url}/v1")
    assert server.http.get(page.locator("#base-url").inner_text() + "/models").status_code == 200
    page.get_by_role("link", name="API reference").click()
    expect(page.locator("h1")).to_have_text("HTTP API")


def test_the_gain_of_drafts_is_that_of_metrics(open_page: Open, server: Running) -> None:
    page = open_page()
    server.complete(PROMPT)
    gain = server.metrics()["dspark:speedup_estimate{}"]
    expect(page.locator("#gain")).to_have_text(f"{gain:.2f}")
    expect(page.locator("#gain-tile")).to_contain_text("of no drafts")
    expect(page.locator("#gain-tile")).to_contain_text("estimate")


def test_every_term_is_explained_to_mouse_keyboard_and_touch(open_page: Open) -> None:
    page = open_page(width=360, height=740)
    terms = page.locator(".term")
    words = terms.all_inner_texts()
    assert {"SPS", "Θ", "B", "Budget", "budget", "survival"} <= set(words)
    for index in range(len(words)):
        term = terms.nth(index)
        word = page.locator(f"#{term.get_attribute('popovertarget')}")
        assert (term.get_attribute("title") or "") == " ".join(word.evaluate("e => e.textContent").split())
        expect(word).to_be_hidden()
        term.focus()
        page.keyboard.press("Enter")
        expect(word).to_be_visible()
        box = word.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] >= 0
        page.keyboard.press("Escape")
        expect(word).to_be_hidden()


def test_it_warns_of_steps_that_the_cost_profile_does_not_explain(
    open_page: Open, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def costs_say(slowdown: float, slow: bool) -> None:
        monkeypatch.setattr(server.engine.stats, "step_slowdown", slowdown)
        monkeypatch.setattr(server.engine.stats, "slow_steps", slow)

    costs_say(1.0, False)
    page = open_page()
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#warning")).to_be_hidden()
    costs_say(6.24, True)
    warning = page.get_by_role("alert")
    expect(warning).to_contain_text("6.2 times what the cost profile says")
    expect(warning).to_contain_text("CPU limit")
    costs_say(0.125, False)
    expect(warning).to_contain_text("8.0 times faster than the cost profile says")
    expect(warning).to_contain_text("--measure-costs-again")
    costs_say(1.1, False)
    expect(warning).to_be_hidden()


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_sees_all_of_it_in_light_and_dark(open_page: Open, dark: bool) -> None:
    page = open_page(width=360, height=740, dark=dark)
    page.get_by_label("Length").select_option("64")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#speed")).to_contain_text("64 tokens")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert (red + green + blue < 150) == dark
    for name in ("prompt", "run", "load", "policy", "drafter", "sps", "batch", "acceptance"):
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360, name
    cut_off = page.evaluate(
        """[...document.querySelectorAll("header p, #facts span, #tiles dt, #tiles dd, #samples button, .note, .term")]
        .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline")
        .map(e => e.outerHTML)"""
    )
    assert cut_off == []
    small = page.evaluate(
        """[...document.querySelectorAll("body :not(.quiet, .cut-mark)")]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length)
        .filter(e => {
            const drawing = e.closest("svg");
            const scale = drawing ? drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width : 1;
            return scale * parseFloat(getComputedStyle(e).fontSize) < 11;
        }).map(e => e.outerHTML)"""
    )
    assert small == []


def test_a_key_is_asked_for_and_sent_with_every_request(browser: Browser) -> None:
    with serving(api_key=("sesame",)) as server:
        page = browser.new_page()
        page.goto(server.url)
        expect(page.locator("#status")).to_have_text("needs a key")
        page.get_by_label("This server asks for an API key").fill("open")
        page.keyboard.press("Enter")
        expect(page.locator("#key-form")).to_be_visible()
        expect(page.get_by_label("This server asks for an API key")).to_be_focused()
        page.get_by_label("This server asks for an API key").fill("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("live")
        page.get_by_role("button", name="Run").click()
        expect(page.locator("#blocks li")).not_to_have_count(0)
        page.reload()
        expect(page.locator("#status")).to_have_text("live")
        page.close()


def test_it_comes_back_after_the_server_was_away(browser: Browser, server: Running) -> None:
    page = browser.new_page()
    refuse = True

    def guard(route: Route) -> None:
        if refuse:
            route.fulfill(status=503, json={"error": {"message": "16 dashboards are open."}})
        else:
            route.continue_()

    page.route("**/dashboard/feed", guard)
    page.goto(server.url)
    expect(page.locator("#status")).to_have_text("16 dashboards are open.")
    refuse = False
    expect(page.locator("#status")).to_have_text("live")
    page.close()
