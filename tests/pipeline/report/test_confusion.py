"""The report shows which classes are taken for which, with pictures behind the numbers, and the images that the run was made from."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest

from data.shards.split import open_split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.report.build import REPORT_NAME, write_report
from tests.browser import CHROMIUM, browser
from tests.conftest import make_writer
from tests.small_run import NUM_TEST, SmallRun


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Path:
    """The report of a run of which the test shards are there: of 400 images, every third is taken for the next class."""
    run = SmallRun(tmp_path_factory.mktemp("confusion"), make_writer(digits))
    make_writer(digits)(run.folder / "test", 0, NUM_TEST)
    config = run.config(truth=False)
    data = config.data.model_copy(update={"test": [f"{run.folder}/test/*.tar"]})
    config = Config.model_validate(config.model_dump() | {"data": data.model_dump()})
    layout, right = Layout(config.run_dir), np.arange(NUM_TEST) % 3 > 0
    run.model(layout.teacher, "teacher")
    run.label(config, layout)
    run.model(layout.student, "student")
    run.evaluate(layout, {"teacher": right, "student": right}, open_split(config.data.test, layout.indexes).digest())
    write_report(config, [layout])
    return Path(config.run_dir) / REPORT_NAME


def test_the_matrix_counts_every_test_image(reported: Path) -> None:
    html = reported.read_text()
    matrix = html[html.index('<table class="matrix">') : html.index("</table>", html.index('<table class="matrix">'))]
    counts = np.array([int(count) for count in re.findall(r">(\d+)<", matrix)])
    truth, right = np.arange(NUM_TEST) % 10, np.arange(NUM_TEST) % 3 > 0
    assert counts.sum() == NUM_TEST
    assert f'title="digit_3: {(right & (truth == 3)).sum()} right"' in matrix
    assert f"{(~right & (truth == 3)).sum()} of digit_3 taken for digit_4" in matrix
    pictures = html[html.index('id="taken-3-4"') :].partition('class="behind"')[0]
    assert pictures.count("data:image/") == 5
    assert 'class="behind" id="taken-3-5"' not in html, "nothing was taken so"


def test_images_are_counted_per_split_and_class(reported: Path) -> None:
    html = reported.read_text()
    section = html[html.index("<h2>Data</h2>") :].partition("</section>")[0]
    assert '<th scope="row">test</th><td>400</td>' in section
    counts = [int(count) for count in re.findall(r'<th scope="row">digit_\d</th><td>(\d+)</td>', section)]
    assert sum(counts) == NUM_TEST


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install the system's package `chromium`")
def test_a_number_leads_to_its_pictures_and_back(reported: Path) -> None:
    visible = "[...document.querySelectorAll('.behind')].filter(each => each.checkVisibility()).map(each => each.id)"

    async def click() -> None:
        async with browser() as page:
            await page.open(reported.as_uri(), 400, dark=True)
            behind = "getComputedStyle(document.querySelector('.sample img')).backgroundColor"
            assert await page.evaluate(behind) == "rgb(255, 255, 255)", (
                "transparent pictures are on white, on dark pages too"
            )
            assert await page.evaluate(visible) == []
            await page.evaluate("document.querySelector('.matrix a[href=\"#taken-3-4\"]').click()")
            assert await page.evaluate(visible) == ["taken-3-4"]
            assert await page.faults() == []
            await page.evaluate("document.querySelector('#taken-3-4 h3 a').click()")
            assert await page.evaluate(visible) == []

    asyncio.run(click())
