"""The rollout report's page in a browser: it asks nobody, fits a telephone, and is readable in light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import expect

from shim.cli.rollout.cluster import Cluster, Trouble
from shim.cli.rollout.report import Report, page
from shim.cli.rollout.verdict import judge
from tests.browser.conftest import OpenTab
from tests.cli.rollout.conftest import DAY_S, NOW, well

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

CONTRAST = """element => {
  const light = color => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(part => part / 255)
      .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
  const pair = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
async def test_the_page(scheme: str, width: int, tmp_path: Path, open_tab: OpenTab) -> None:
    rows = [
        *(well(f"edge-{number:02}") for number in range(12)),
        well("a-cluster-with-a-rather-long-name.eu-west-1.example", troubles=[Trouble("agent_unknown", "is unknown")]),
        Cluster(name="gone", gaps=["error: context does not exist"]),
    ]
    path = tmp_path / "report.html"
    path.write_text(page(Report(rows, judge(rows, NOW, DAY_S), NOW)))
    tab = await open_tab(f"file://{path}", viewport={"width": width, "height": 900}, color_scheme=scheme)
    await expect(tab.page.locator(".verdict strong")).to_contain_text("Go back: a-cluster-with")
    assert await tab.page.locator("tbody tr").count() == len(rows)
    assert await tab.page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in (".verdict strong", "li b", "td .good", "footer", "th"):
        assert await tab.page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector
    assert (tab.complaints, tab.hosts()) == ([], {""})
