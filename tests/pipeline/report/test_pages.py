"""The report and the server's page have no faults in a headless Chromium: narrow and wide, light and dark, printed."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from pipeline.core.layout import Layout
from pipeline.report.build import REPORT_NAME, write_report
from pipeline.serving.server import open_catalog
from tests.browser import CHROMIUM, browser
from tests.conftest import make_writer
from tests.pipeline.report.test_report import whole_run
from tests.serving import make_run, server_thread
from tests.small_run import SmallRun

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install the system's package `chromium`")

LOOKS = [(400, False), (400, True), (1600, False), (1600, True)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> str:
    config, layout = whole_run(SmallRun(tmp_path_factory.mktemp("report"), make_writer(digits)))
    write_report(config, [layout])
    return (Path(config.run_dir) / REPORT_NAME).as_uri()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Iterator[str]:
    run = make_run(tmp_path_factory.mktemp("serve"), make_writer(digits))
    config = run.config(serve={"source": "run"})
    with server_thread(open_catalog(config, [Layout(config.run_dir)])) as url:
        yield f"{url}/"
    ray.shutdown()


@pytest.mark.parametrize("name", ["report", "served"])
def test_a_page_can_be_read(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url: str = request.getfixturevalue(name)

    async def look() -> None:
        async with browser() as page:
            for width, dark in LOOKS:
                await page.open(url, width, dark=dark)
                assert await page.faults() == [], (width, dark)
                own = [address for address in page.requests if not address.startswith("data:")]
                assert all(address.startswith(url) for address in own)  # no request to another server
                assert own == [url] or name == "served"  # the report is one file
                png = await page.screenshot()
                (tmp_path / f"{name}-{width}-{'dark' if dark else 'light'}.png").write_bytes(png)
                picture = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
                assert picture.shape[1] == width
                assert (np.median(picture) < 100) == dark

    asyncio.run(look())


@pytest.mark.parametrize("name", ["report", "served"])
def test_a_page_can_be_printed(name: str, request: pytest.FixtureRequest) -> None:
    url: str = request.getfixturevalue(name)

    async def print_it() -> bytes:
        async with browser() as page:
            await page.open(url, 1000, dark=True)
            return await page.pdf()

    pdf = asyncio.run(print_it())
    assert pdf.startswith(b"%PDF-")
    assert len(pdf) > 10_000


def test_faults_are_found(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        '<!DOCTYPE html><html><body style="background:#fff"><h1>a</h1><h1>b</h1><img src="gone.png"><p style="color:#aaa">pale</p>'
        '<div style="width:900px">wide</div><small style="font-size:6px">tiny</small><script>fail()</script>'
    )

    async def look() -> list[str]:
        async with browser() as page:
            await page.open((tmp_path / "bad.html").as_uri(), 400)
            return await page.faults()

    faults = "\n".join(asyncio.run(look()))
    seen = "px wide in a window of 400", "no language", "not one h1", "no alt text", "not shown", "contrast 2.32: pale"
    for words in (*seen, "6px letters: tiny", "Uncaught"):
        assert words in faults
