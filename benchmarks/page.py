"""How long the page of ten runs of 100,000 steps takes to make, and to open in a browser, against a limit of 2 s.

    python benchmarks/page.py [--steps 100000] [--runs 10]

The browser is Debian's chromium without a display or a GPU, by Playwright. Opened means that the figures on the screen
have been painted and the page takes input; drawn, that those below it have been, too.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.unit.trainer.page.runs import write_whole_run  # noqa: E402
from zeropipe.trainer.page.page import write_page  # noqa: E402

LIMIT, BYTES, TIMES = 2.0, 3_000_000, 5
FACTS = """() => ({
    points: zeropipe.charts.map(({figure}) => figure.lines.reduce((sum, line) => sum + line.x.length, 0)),
    nodes: document.getElementsByTagName("*").length})"""


def opened(browser: object, file: Path, size: dict[str, int]) -> tuple[float, float, dict]:
    """Seconds until the page is painted, and until all of it is drawn; how many points each figure has, and nodes."""
    page = browser.new_context(viewport=size, offline=True).new_page()  # type: ignore[attr-defined]
    begun = time.perf_counter()
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    seen = time.perf_counter() - begun
    page.wait_for_selector("html[data-drawn]", state="attached")
    drawn, facts = time.perf_counter() - begun, page.evaluate(FACTS)
    page.context.close()
    return seen, drawn, facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        rates = [1e-4 * (number + 1) for number in range(args.runs)]
        runs = [write_whole_run(Path(folder) / f"run{rate:g}", args.steps, rate) for rate in rates]
        read = sum((run / "metrics.jsonl").stat().st_size for run in runs)
        begun = time.perf_counter()
        size = write_page(runs, file := Path(folder) / "page.html")
        made = time.perf_counter() - begun
        print(f"{args.runs} runs of {args.steps:,} steps, evaluated, asked and saved every tenth: {read / 1e6:.0f} MB")
        print(f"made in {made:.1f} s; {size / 1e6:.2f} MB (limit {BYTES / 1e6:.0f})")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        worst = 0.0
        for screen, pixels in (("desk", {"width": 1400, "height": 900}), ("phone", {"width": 390, "height": 844})):
            found = [opened(browser, file, pixels) for _ in range(TIMES)]
            seen, drawn = (statistics.median(times) for times in list(zip(*found, strict=True))[:2])
            points, worst = found[0][2]["points"], max(worst, seen)
            print(
                f"{screen}: opened in {seen:.2f} s (limit {LIMIT:.0f}: {seen / LIMIT:.2f} x), all drawn {drawn:.2f} s"
            )
        print(f"{len(points)} figures, at most {max(points):,} points in one; {found[0][2]['nodes']:,} nodes")
        browser.close()
    return 0 if worst <= LIMIT and size < BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
