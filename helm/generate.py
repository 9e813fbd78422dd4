"""Writes what follows from other files: the chart's schema and README, and the Kustomize components.

`python helm/generate.py` writes them, `--check` says which differ and exits with 1.
"""

from __future__ import annotations

import difflib
import io
import json
import re
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import msgspec
from ruamel.yaml import YAML

from shim.cli.inject.sidecar import API_URL, INJECTED_LABEL, NAME, SHIM_URL, UPSTREAM_URL, Sidecar
from shim.config.loader import REMOVED
from shim.config.rules import BOUNDS, DATE, HOST, PATH
from shim.config.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "agent-shim"
COMPONENTS = ROOT / "config" / "kustomize"
VENDOR_NAMESPACE = "pipeops-system"

# What the chart sets itself: by ports, admin, store, upstream, gateway.tlsSecretName and the pod.
OWNED = (
    *("listen.host", "listen.port", "listen.tls", "admin.host", "admin.port", "admin.token_file"),
    *("cluster.host", "cluster.port", "cluster.advertise", "cluster.replica"),
    *("store", "upstream.url", "upstream.token", "upstream.token_file"),
)
_PROXY = r"^(https?://[^\s/]+\S*)?$"
_NOT_EMPTY = r"."

# What the text of a key, or of each item of a list, must match. Helm checks it when the chart is installed, because a
# sidecar that ends over its configuration keeps the agent from starting. `shim.config.rules` checks more than that.
PATTERNS: dict[str, str] = {
    "listen.base_path": f"^{PATH.pattern}$",
    "listen.allowed_hosts": f"^{HOST.pattern}$",
    "admin.allowed_hosts": f"^{HOST.pattern}$",
    "upstream.path": f"^{PATH.pattern}$",
    "upstream.gateway_hosts": f"^{HOST.pattern}$",
    "upstream.proxy": _PROXY,
    "fallback.url": r"^(https?://[^\s/?#@]+([/?][^\s#]*)?)?$",
    "fallback.proxy": _PROXY,
    "notify.proxy": _PROXY,
    "notify.url": r"^(https?://[^\s/]+\S*)?$",
    "telemetry.otlp_url": r"^(https?://[^\s/@]+([/?]\S*)?)?$",
    "sunset.deprecation_at": f"^({DATE.pattern})?$",
    "sunset.at": f"^({DATE.pattern})?$",
    "sunset.link": r"^(https?://[^\s<>\"]+)?$",
    "commands.types": _NOT_EMPTY,
    "commands.at_most_once": _NOT_EMPTY,
    "rollout.include": _NOT_EMPTY,
    "rollout.exclude": _NOT_EMPTY,
}
_GENERATED = "# Written by `make chart` from shim/cli/inject/sidecar.py.\n"


# --- values.schema.json -----------------------------------------------------------------------------------------------


def schema() -> str:
    """Return the chart's schema: `schema/values.json`, written by hand, with `config` from the shim's settings."""
    own = json.loads((CHART / "schema" / "values.json").read_text())
    own["properties"]["config"] = _config_schema()
    return json.dumps(own, indent=2) + "\n"


def _config_schema() -> dict[str, Any]:
    whole = msgspec.json.schema(Settings)
    config = _inline(whole["$defs"]["Settings"], whole["$defs"], "")
    for key in OWNED:
        section, *path = key.split(".")
        parent = config["properties"]
        for name in path:
            parent, section = parent[section]["properties"], name
        del parent[section]
    for key in REMOVED:
        if "." not in key:
            config["properties"][key] = {"type": "object"}
    config["description"] = "The shim's own configuration; docs/reference/configuration.md."
    return config


def _inline(node: dict[str, Any], defs: dict[str, Any], path: str) -> dict[str, Any]:
    """`node` with its references resolved, its defaults left out, and the bounds and patterns of the key at `path`."""
    if "$ref" in node:
        return _inline(defs[node["$ref"].rpartition("/")[2]], defs, path)
    kept = {key: value for key, value in node.items() if key not in {"title", "default", "description", "required"}}
    if "properties" in kept:
        prefix = f"{path}." if path else ""
        kept["properties"] = {key: _inline(value, defs, prefix + key) for key, value in kept["properties"].items()}
    if "anyOf" in kept:
        kept["anyOf"] = [_inline(each, defs, path) for each in kept["anyOf"]]
    if path in BOUNDS and kept.get("type") in {"integer", "number"}:
        kept["minimum"], kept["maximum"] = BOUNDS[path]
    if path in PATTERNS and kept.get("type") == "string":
        kept["pattern"] = PATTERNS[path]
    if "items" in kept:
        kept["items"] = _inline(kept["items"], defs, path)
    return kept


# --- README.md --------------------------------------------------------------------------------------------------------


def readme() -> str:
    """The template with the table of all values in it."""
    template = (CHART / "schema" / "README.md.in").read_text()
    return template.replace("@VALUES@", "\n".join(_rows()))


def _rows() -> list[str]:
    yaml = YAML(typ="rt")
    values = yaml.load(CHART / "values.yaml")
    comments = _comments((CHART / "values.yaml").read_text())
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for path in comments:
        value: Any = values
        for key in path.split("."):
            value = value[key]
        rows.append(f"| `{path}` | `{json.dumps(value)}` | {comments[path]} |")
    return rows


def _comments(text: str) -> dict[str, str]:
    """Dotted path of every value with a `# -- ` comment in front → its text."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if match := re.match(r" *# (?:-- )?(.*)", line):
            comment = [match[1]] if "# -- " in line else [*comment, match[1]] if comment else []
            continue
        if match := re.match(r"( *)([\w]+):", line):
            depth = len(match[1])
            path = [*((indent, key) for indent, key in path if indent < depth), (depth, match[2])]
            if comment:
                found[".".join(key for _, key in path)] = " ".join(comment)
        comment = []
    return found


# --- Kustomize --------------------------------------------------------------------------------------------------------


def components() -> dict[Path, str]:
    """Path → text of every generated file of the components."""
    by_secret = {"valueFrom": {"secretKeyRef": {"name": "pipeops-agent-config", "key": API_URL, "optional": True}}}
    manifest = Sidecar(upstream=by_secret)
    # The entry is replaced by the agent's own variable, before that is changed; `rename` gives it its name back.
    chart = Sidecar(upstream={"value": "set-by-replacement"}, token_key="token")  # noqa: S106 - the name of a key
    at = [entry["name"] for entry in chart.container["env"]].index(UPSTREAM_URL)
    rename = {
        "op": "replace",
        "path": f"/spec/template/spec/initContainers/0/env/{at}/name",
        "value": UPSTREAM_URL,
    }
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        # Without a namespace it would land in the current one, and the agent's pod would wait for it.
        "metadata": {"name": NAME, "namespace": VENDOR_NAMESPACE},
        "data": {"config.yaml": _yaml(manifest.settings)},
    }
    return {
        COMPONENTS / "manifest" / "sidecar.yaml": _GENERATED + _yaml(_patch(manifest, "agent", redirect=True)),
        COMPONENTS / "chart" / "sidecar" / "sidecar.yaml": _GENERATED + _yaml(_patch(chart, "", redirect=False)),
        COMPONENTS / "chart" / "redirect.yaml": _GENERATED + _yaml(_patch(None, "pipeops-agent", redirect=True)),
        COMPONENTS / "chart" / "rename.yaml": _GENERATED + dedent(_yaml([rename])),
        COMPONENTS / "config" / "configmap.yaml": _GENERATED + _yaml(config),
    }


def _patch(sidecar: Sidecar | None, agent: str, *, redirect: bool) -> dict[str, Any]:
    """A strategic merge patch of the agent's Deployment."""
    template: dict[str, Any] = {}
    spec: dict[str, Any] = {}
    if sidecar is not None:
        template["metadata"] = {"labels": {INJECTED_LABEL: "enabled"}}
        spec |= {"initContainers": [sidecar.container], "volumes": sidecar.volumes}
    if redirect:
        # `valueFrom: null`, because an env entry has a value or a source, not both.
        spec["containers"] = [{"name": agent, "env": [{"name": API_URL, "value": SHIM_URL, "valueFrom": None}]}]
    template["spec"] = spec
    metadata = {"name": "pipeops-agent"}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": {"template": template}}


def _yaml(data: Any) -> str:
    from ruamel.yaml.scalarstring import walk_tree  # noqa: PLC0415

    yaml, out = YAML(), io.StringIO()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 120
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml.representer.ignore_aliases = lambda _: True
    walk_tree(data)
    yaml.dump(data, out)
    return out.getvalue()


def outputs() -> dict[Path, str]:
    """Every generated file and what it must hold."""
    return {CHART / "values.schema.json": schema(), CHART / "README.md": readme()} | components()


def main() -> int:
    """Write, or with `--check` compare."""
    code = 0
    for path, text in outputs().items():
        before = path.read_text() if path.exists() else ""
        if before == text:
            continue
        name = str(path.relative_to(ROOT))
        if "--check" in sys.argv[1:]:
            code = 1
            print(f"{name} is not what `make chart` writes")
            print("\n".join(list(difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm=""))[:40]))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {name}")
    return code


if __name__ == "__main__":
    sys.exit(main())
