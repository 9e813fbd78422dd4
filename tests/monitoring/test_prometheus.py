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
from tests.support.processes import TOKEN, Controller, Shim, world
from tests.support.prometheus import Prometheus, prometheus

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "config" / "grafana"
DASHBOARDS: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in GRAFANA.glob("*.json")}
DASHBOARD, FLEET = DASHBOARDS["dashboard"], DASHBOARDS["fleet"]
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


def queries(dashboard: dict[str, Any], label: str = "cluster") -> list[tuple[str, str]]:
    """(panel, expression) of a whole dashboard, with its variables filled in."""
    values = {"$instance": ".*", "$__rate_interval": WINDOW, "$label": label, "$cluster": ".*"}
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in values.items():
                expression = expression.replace(variable, value)
            found.append((panel["title"], expression))
    return found


async def answer_commands(controller: Controller) -> None:
    for _ in range(3):
        assert (await result_of(controller, await push(controller)))["success"] is True


@pytest.mark.needs("prometheus")
@pytest.mark.timeout(400)
async def test_alerts_fire_when_the_controller_is_cut_and_clear_when_it_is_back(tmp_path: Path) -> None:
    config = {"upstream": {"heartbeat_interval_s": 2.0}, "poll": {"hold": 5}}
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


@pytest.mark.needs("prometheus")
async def test_the_dashboard_of_all_clusters_over_several_shims(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    config = {"upstream": {"heartbeat_interval_s": 2.0}, "poll": {"hold": 5}, "rollout": {"percent": 10}}
    async with (
        world(tmp_path, config) as (shim, controller),
        Shim(
            tmp_path / "other", {"upstream": {"url": controller.url, "token": TOKEN}, "rollout": {"percent": 50}}
        ) as other,
    ):
        for each in (shim, other):
            await each.start()
        targets = {"agent-shim": shim, "agent-shim-other": other}
        addresses = {job: each.admin.removeprefix("http://") for job, each in targets.items()}
        rules = {"rules.yaml": rendered("rules.yaml")}
        clusters = {"agent-shim": "eu", "agent-shim-other": "us"}
        async with living(shim, "clusters_agent"), prometheus(tmp_path, addresses, rules, clusters, "5s") as prom:
            await answer_commands(controller)
            # Two scrapes of both: until then nothing has grown.
            await prom.until_query("count(count_over_time(agent_shim_build_info[1m]) > 1) == 2")
            await prom.until_query("agent_shim:heartbeat_success:ratio_rate1h")
            await shown(prom, FLEET)
            await shown(prom, FLEET, "instance")
            found = {title: await prom.query(expression) for title, expression in queries(FLEET)}
            names = {each["metric"]["cluster"] for each in await prom.query("agent_shim_build_info")}
    assert names == {"eu", "us"}
    values = {
        title: float(found[title][0]["value"][1]) for title in ("Clusters", "On WebSocket", "Lowest step", "Gone")
    }
    assert values == {"Clusters": 2, "On WebSocket": 1, "Lowest step": 10, "Gone": 0}


async def shown(prom: Prometheus, dashboard: dict[str, Any], label: str = "cluster") -> None:
    """Each query of a dashboard is valid, names only what is there, and most have something to show."""
    names = await prom.names()
    for title, expression in queries(dashboard, label):
        for name in re.findall(r"\bagent_shim\w*(?::\w+)*", expression):
            assert name in names or ":" in name, (title, name)
        # what did not happen is not shown, and a share of nothing is none
        may_be_empty = expression.rstrip(")").endswith("> 0") or "ratio_rate" in expression
        await prom.until_query(expression, (lambda _: True) if may_be_empty else bool)


async def every_query(prom: Prometheus) -> None:
    """Each query of the dashboard has something to show, and each metric of the page is there."""
    await shown(prom, DASHBOARD)
    names = await prom.names()
    exposed = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in names if name.startswith("agent_shim_")}
    missing = set(documented()) - exposed
    # A shim on a file is no replica: these are exposed with `store.url` only, and tests/cluster read them there.
    of_replicas = ("agent_shim_shards", "agent_shim_replicas", "agent_shim_forwarded_requests")
    missing = {name for name in missing if not name.startswith(of_replicas)}
    assert not missing, "documented, and not exposed by a shim with an agent"
    assert exposed - set(documented()) == set()


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=list(DASHBOARDS))
def test_no_two_panels_overlap_and_all_is_within_the_grid(dashboard: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name, chosen", [("dashboard", 'instance=~"$instance"'), ("fleet", '$label=~"$cluster"')])
def test_every_panel_is_of_the_chosen_shims_and_data_source(name: str, chosen: str) -> None:
    for panel in DASHBOARDS[name]["panels"]:
        for target in panel.get("targets", ()):
            selectors = re.findall(r"\bagent_shim\w*(?::\w+)*(\{[^}]*\})?", target["expr"])
            assert all(chosen in selector for selector in selectors), target["expr"]
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


TYPES = """\
import type { Dashboard } from '@grafana/schema';
import type { Options as TimeseriesOptions, FieldConfig as TimeseriesFields }
  from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';
import type { Options as StatOptions }
  from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type { Options as TableOptions }
  from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
"""


@pytest.mark.needs("node", "npm:typescript", "npm:@grafana/schema")
@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=list(DASHBOARDS))
async def test_the_dashboard_fits_grafanas_own_types(dashboard: dict[str, Any], tmp_path: Path) -> None:
    modules = ROOT / "tests" / "clients" / "node_modules"
    lines = [TYPES, f"export const dashboard: Plain<Dashboard> = {json.dumps(dashboard)};"]
    for panel in dashboard["panels"]:
        number, options = panel["id"], json.dumps(panel.get("options"))
        if panel["type"] == "timeseries":
            custom = json.dumps(panel["fieldConfig"]["defaults"]["custom"])
            lines.append(f"export const options{number}: Plain<TimeseriesOptions> = {options};")
            lines.append(f"export const fields{number}: Plain<TimeseriesFields> = {custom};")
        elif panel["type"] == "stat":
            lines.append(f"export const options{number}: Plain<Partial<StatOptions>> = {options};")
        elif panel["type"] == "table":
            lines.append(f"export const options{number}: Plain<Partial<TableOptions>> = {options};")
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
