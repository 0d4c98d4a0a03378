"""The report page in a real browser: Debian's chromium, driven by Playwright, without a display."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.tiny import tiny_json, tiny_recipe, tiny_store, write_pair
from tests.unit.trainer.page.runs import step_record, write_whole_run
from zeropipe.trainer.page.live import LiveRuns
from zeropipe.trainer.page.page import write_page
from zeropipe.trainer.page.server import PageServer

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (scripts/system_packages.sh)")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1400, "height": 900}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    runs = [write_whole_run(folder / name, 200, rate) for name, rate in (("one", 3e-4), ("two", 1e-4))]
    write_page(runs, folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield own
        own.close()


def opened(browser: Any, page_file: Path, theme: str, size: dict[str, int]) -> tuple[Any, list[str]]:
    page = browser.new_context(viewport=size, color_scheme=theme, offline=True).new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-drawn]")  # what is below the screen, too
    return page, said


@pytest.mark.parametrize(("theme", "size"), [("light", DESK), ("dark", PHONE)], ids=["light-desk", "dark-phone"])
def test_it_is_whole_and_open_to_all(browser, page_file, theme, size):
    from axe_playwright_python.sync_playwright import Axe

    page, said = opened(browser, page_file, theme, size)
    page.get_by_text("Perplexity as a table").click()
    assert page.locator("#charts section").count() == 10
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "wider than the screen"
    drawn = """zeropipe.charts.map(({plot}) => { const c = plot.ctx.canvas;
        return new Set(new Uint32Array(plot.ctx.getImageData(0, 0, c.width, c.height).data.buffer)).size > 5; })"""
    assert page.evaluate(drawn) == [True] * 10
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []
    assert page.locator("#answers td").first.inner_text() == "</script><b>A" and page.locator("#answers b").count() == 0
    assert said == []


def test_it_is_worked_with_mouse_and_keys(browser, page_file):
    from playwright.sync_api import expect

    page, said = opened(browser, page_file, "light", DESK)
    scale = "[zeropipe.charts[1].plot.scales.x.min, zeropipe.charts[1].plot.scales.x.max]"
    assert page.evaluate(scale) == [1, 200] or page.evaluate(scale) == [10, 200]
    box = page.locator("#charts .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50, steps=4)
    page.mouse.up()
    low, high = page.evaluate(scale)
    assert 45 < low < 56 and 95 < high < 106, "every figure follows the zoom of one"
    chart = page.locator("#charts .plot").first
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert "train" in page.locator("#charts .at").first.inner_text()
    page.keyboard.press("+")
    assert page.evaluate("zeropipe.charts[0].plot.scales.x.max") < high
    page.keyboard.press("Escape")
    assert page.evaluate("zeropipe.charts[0].plot.scales.x.max") == 200
    page.select_option("#axis", "tokens")
    assert page.evaluate("zeropipe.charts[0].plot.scales.x.max") == pytest.approx(200 * 250, rel=1e-3)
    page.select_option("#axis", "hours")
    assert page.evaluate("zeropipe.charts[0].plot.scales.x.max") == pytest.approx(200 * 0.5 / 3600, rel=1e-3)
    page.select_option("#axis", "step")
    before = page.evaluate("Math.max(...zeropipe.charts[0].plot.data[1])")
    page.locator("#smooth").fill("0.9")
    assert before == 99 and page.evaluate("Math.max(...zeropipe.charts[0].plot.data[1])") < 30
    page.locator("#log").check()
    assert page.evaluate("zeropipe.charts[0].plot.scales.y.distr") == 3
    page.get_by_role("checkbox", name="two").uncheck()
    shown = "zeropipe.charts[0].plot.series.filter((s, n) => n && s.show).length"
    assert page.evaluate(shown) == 2, "the other run's two lines"
    page.get_by_text("Loss as a table").click()
    expect(page.locator("#charts section").first.locator("table")).to_have_count(4)  # made when it is opened
    assert (
        page.locator("#recipe tr.differs").count() == 1
        and "optimizer.lr" in page.locator("#recipe tr.differs").inner_text()
    )
    assert said == []


def test_the_live_page_follows_a_run_and_outlives_its_server(browser, tmp_path):
    """A run grows, another is begun in its folder, the server goes and comes back."""
    from playwright.sync_api import expect

    write_whole_run(tmp_path / "one", 50)
    server = served(tmp_path)
    page = browser.new_context(viewport=DESK).new_page()
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#state li")).to_have_text(["one: finished, step 50 of 50"], timeout=60_000)
    last = "zeropipe.charts[0].plot.data[0].at(-1)"
    assert page.evaluate(last) == 50
    page.get_by_text("Loss as a table").click()
    page.evaluate("zeropipe.zoom(10, 20)")
    with (tmp_path / "one" / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(step_record(step, 1e-4, 0, "b")) + "\n" for step in range(51, 61))
    expect(page.locator("#state li")).to_have_text(["one: finished, step 60 of 50"], timeout=60_000)
    assert page.evaluate(last) == 60
    assert page.evaluate("zeropipe.charts[0].plot.scales.x.max") == 20, "what is looked at stays"
    assert page.locator("#charts section").first.locator("table").count() == 2
    server.shutdown()
    server.server_close()
    expect(page.locator("#link")).to_contain_text("No answer", timeout=60_000)
    write_whole_run(tmp_path / "two", 50)
    server = served(tmp_path, server.server_address[1])
    expect(page.locator("#state li")).to_have_text(
        ["one: finished, step 60 of 50", "two: finished, step 50 of 50"], timeout=60_000
    )
    expect(page.locator("#link")).to_be_empty()
    assert page.locator("#runs input").count() == 2 and page.locator("#charts section").count() == 10
    assert said == []
    page.context.close()
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.distributed
def test_the_live_page_follows_a_run_that_trains(browser, tmp_path):
    """From its first steps to its end, through a stop and a resume, read from the outside as it is written."""
    from playwright.sync_api import expect

    store = tiny_store(tmp_path / "store")
    sections = {"log": {"every": 1}, "eval": {"every": 10, "batches": 1}, "save": {"every": 20}}
    recipe = tiny_recipe(store, tmp_path / "runs" / "live", duration={"steps": 400}, **sections)
    pair = write_pair(tmp_path, recipe, tiny_json("zero1"))
    command = [sys.executable, "-m", "zeropipe.trainer", "--run", pair[0], "--deepspeed_config", pair[1]]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "runs" / "live" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and '"kind": "train"' in metrics.read_text(), training)
        server = served(tmp_path / "runs")
        page = browser.new_context(viewport=DESK).new_page()
        said: list[str] = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        expect(page.locator("#state li")).to_have_text(
            re.compile(r"live: training, step [\d,]+ of 400"), timeout=60_000
        )
        last = "zeropipe.charts[0].plot.data[0].at(-1)"
        first = page.evaluate(last)
        wait_until(lambda: page.evaluate(last) > first, training)
        training.send_signal(signal.SIGTERM)
        assert training.wait(120) == 4, training.communicate()
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        expect(page.locator("#state li")).to_have_text("live: finished, step 400 of 400", timeout=200_000)
        assert training.wait(60) == 0
        assert page.evaluate(last) == 400
        assert page.get_by_text("resumes", exact=True).count() >= 1
        assert said == []
        page.context.close()
        server.shutdown()
        server.server_close()
    finally:
        training.kill()
        training.wait()


def wait_until(there: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None and time.monotonic() < end, "it does not train"
        time.sleep(0.1)


def served(folder: Path, port: int = 0) -> PageServer:
    server = PageServer(LiveRuns(folder), "127.0.0.1", port)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server
