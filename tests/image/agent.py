"""A stand-in for the vendor's agent (B4 and later): standard library only, runs in the shim's image.

Its requests follow docs/reference/legacy-agents.md#1-legacy-http-endpoints.

Like the real one it registers once and exits if that fails, and then beats and polls what it was told to call.
"""

import json
import os
import sys
import time
import urllib.request

BASE = os.environ["PIPEOPS_API_URL"]
HEADERS = {"Authorization": f"Bearer {os.environ['PIPEOPS_TOKEN']}", "Content-Type": "application/json"}


def call(method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(BASE + path, data, HEADERS, method=method)  # noqa: S310 - its own settings
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        text = response.read()
    return json.loads(text) if text else {}


def main():
    name = os.environ["PIPEOPS_CLUSTER_NAME"]
    try:
        cluster = call("POST", "/api/v1/clusters/agent/register", {"agent_id": "pod-1", "name": name})["cluster_id"]
    except OSError as error:
        print(f"registration failed: {error}", flush=True)
        sys.exit(1)
    print(f"registered {cluster} at {BASE}", flush=True)
    root = f"/api/v1/clusters/agent/{cluster}"
    while True:
        call("POST", f"{root}/heartbeat", {"cluster_id": cluster, "agent_id": "pod-1", "status": "healthy"})
        for command in call("GET", f"{root}/poll").get("commands") or []:
            print(f"command {command['id']}", flush=True)
            result = {"success": True, "output": f"done: {command['payload']}"}
            call("POST", f"{root}/commands/{command['id']}/result", result)
        time.sleep(0.2)


main()
