"""A real Prometheus scrapes a real shim: alerts fire and clear; each query of the dashboard and each metric works."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.test_metrics import documented
from tests.e2e.test_main_job import living, push, result_of
from tests.support.processes import Controller, world
from tests.support.prometheus import Prometheus, prometheus

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "config" / "grafana" / "dashboard.json").read_text())
WINDOW = "10s"
SCRAPED = """
groups:
  - name: test
    rules:
      - {alert: Scraped, expr: 'count_over_time(agent_shim_links{state="online"}[10s]) > 5'}
"""


def rendered(name: str) -> str:
    """A rule file with windows of seconds and alerts that do not wait."""
    text = (ROOT / "config" / "prometheus" / name).read_text()
    text = re.sub(r"for: \d+m", "for: 0s", text)
    return re.sub(r"\[\d+[mhd]\]", f"[{WINDOW}]", text)


def queries() -> list[tuple[str, str]]:
    """(panel, expression) of the whole dashboard, with its variables filled in."""
    return [
        (panel["title"], target["expr"].replace("$instance", ".*").replace("$__rate_interval", WINDOW))
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]


async def answer_commands(controller: Controller) -> None:
    for _ in range(3):
        assert (await result_of(controller, await push(controller)))["success"] is True


@pytest.mark.needs("prometheus")
@pytest.mark.timeout(400)
async def test_alerts_fire_when_the_controller_is_cut_and_clear_when_it_is_back(tmp_path: Path) -> None:
    config = {"upstream": {"heartbeat_interval_s": 0.2}, "poll": {"hold": 5}}
    async with world(tmp_path, config) as (shim, controller):
        await shim.start()
        rules = {"rules.yaml": rendered("rules.yaml"), "alerts.yaml": rendered("alerts.yaml"), "test.yaml": SCRAPED}
        target = shim.admin.removeprefix("http://")
        async with living(shim, "clusters_agent"), prometheus(tmp_path, {"agent-shim": target}, rules) as prom:
            await answer_commands(controller)
            await prom.until("Scraped", firing=True)
            await prom.until_query(
                "ALERTS{alertname=~'AgentShim(Down|LinkDown|StoreFailing)'}", lambda found: not found
            )
            await prom.until_query("agent_shim_message_latency_seconds_count{direction='up'} == 3", bool)
            await every_query(prom)
            routes = {each["metric"]["route"] for each in await prom.query("agent_shim_deprecated_calls_total > 0")}
            assert "POST /api/v1/clusters/agent/{cluster_id}/heartbeat" in routes
            assert not any("health" in route for route in routes)
            await prom.until_query("agent_shim_agent_heartbeats_total{outcome='acked'} > 0", bool)

            await controller.kill()
            await prom.until("AgentShimLinkDown", firing=True)
            firing = "ALERTS{alertname='AgentShimLinkDown', alertstate='firing'}"
            await prom.until_query(firing, lambda found: len(found) == 1)
            await controller.start()
            await prom.until("AgentShimLinkDown", firing=False)
            await shim.kill()
            await prom.until("AgentShimDown", firing=True)


async def every_query(prom: Prometheus) -> None:
    """Each query of the dashboard is valid, names only what is there, and most have something to show."""
    names = await prom.names()
    for title, expression in queries():
        for name in re.findall(r"\bagent_shim\w*(?::\w+)*", expression):
            assert name in names or ":" in name, (title, name)
        # what did not happen is not shown, and a share of nothing is none
        may_be_empty = expression.endswith("> 0") or "ratio_rate" in expression
        await prom.until_query(expression, (lambda _: True) if may_be_empty else bool)
    exposed = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in names if name.startswith("agent_shim_")}
    missing = set(documented()) - exposed
    # A shim on a file is no replica: these are exposed with `store.url` only, and tests/cluster read them there.
    of_replicas = ("agent_shim_shards", "agent_shim_replicas", "agent_shim_forwarded_requests")
    missing = {name for name in missing if not name.startswith(of_replicas)}
    assert not missing, "documented, and not exposed by a shim with an agent"
    assert exposed - set(documented()) == set()


def test_no_two_panels_overlap_and_all_is_within_the_grid() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_every_panel_is_of_the_chosen_shims_and_data_source() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            selectors = re.findall(r"\bagent_shim\w*(?::\w+)*(\{[^}]*\})?", target["expr"])
            assert all('instance=~"$instance"' in selector for selector in selectors), target["expr"]
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


TYPES = """\
import type { Dashboard } from '@grafana/schema';
import type { Options as TimeseriesOptions, FieldConfig as TimeseriesFields }
  from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';
import type { Options as StatOptions }
  from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
"""


@pytest.mark.needs("node", "npm:typescript", "npm:@grafana/schema")
async def test_the_dashboard_fits_grafanas_own_types(tmp_path: Path) -> None:
    modules = ROOT / "tests" / "clients" / "node_modules"
    lines = [TYPES, f"export const dashboard: Plain<Dashboard> = {json.dumps(DASHBOARD)};"]
    for panel in DASHBOARD["panels"]:
        number, options = panel["id"], json.dumps(panel.get("options"))
        if panel["type"] == "timeseries":
            custom = json.dumps(panel["fieldConfig"]["defaults"]["custom"])
            lines.append(f"export const options{number}: Plain<TimeseriesOptions> = {options};")
            lines.append(f"export const fields{number}: Plain<TimeseriesFields> = {custom};")
        elif panel["type"] == "stat":
            lines.append(f"export const options{number}: Plain<Partial<StatOptions>> = {options};")
        else:
            assert panel["type"] == "row"
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "dashboard.mts").write_text("\n".join(lines))
    compiler = {"noEmit": True, "strict": True, "module": "nodenext", "skipLibCheck": True, "types": []}
    (tmp_path / "tsconfig.json").write_text(json.dumps({"compilerOptions": compiler, "files": ["dashboard.mts"]}))
    process = await asyncio.create_subprocess_exec(
        *(str(modules / ".bin" / "tsc"), "-p", str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
