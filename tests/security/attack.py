"""An independent attempt to break in: tries the attacks of the threat model on running shims, and tells what happened.

    python -m tests.security.attack            prints the table; exit code 1 if something gave way
    python -m tests.security.attack --write    puts it into docs/concepts/threat-model.md

The shims are real processes with the development controller; the attacker has raw sockets, listeners and files.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import ssl
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import trustme

from tests.security.raw_client import Line, Reply, ask, request, trap
from tests.support.processes import TOKEN, Controller, Shim, world

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "concepts" / "threat-model.md"
BEGIN, END = "<!-- attacks: generated -->", "<!-- end of attacks -->"
BASE = "/api/v1/clusters/agent"
SECRET = "k8s-service-token-of-the-agent"
REFUSED_S = 20.0
LIMITS = {"header_timeout_s": 0.3, "body_timeout_s": 1.5, "keepalive_s": 1.0, "max_connections": 30}


class Breach(Exception):
    """The attack worked although nothing in the threat model says so."""


class Finding(NamedTuple):
    """A row of the table. `known`: it works, and the threat model says that it does."""

    actor: str
    attack: str
    happened: str
    known: bool = False


def held(true: bool, happened: str) -> str:
    """`happened`, if the shim held."""
    if not true:
        raise Breach(happened)
    return happened


async def refused(call: Callable[[], Awaitable[Reply]]) -> Reply:
    """Call until the answer is another than 200."""
    async with asyncio.timeout(REFUSED_S):
        while (reply := await call()).status == 200:
            pass
    return reply


@dataclass(slots=True)
class Site:
    """A shim under attack, with its controller and its folder."""

    shim: Shim
    controller: Controller
    folder: Path
    cluster_id: str = ""

    async def call(
        self, method: str, path: str, body: Any = None, *headers: str, token: str = "", host: str = "localhost"
    ) -> Reply:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        bearer = (f"Authorization: Bearer {token}",) if token else ()
        return await ask(self.shim.url, request(method, path, *bearer, *headers, body=data, host=host))

    async def admin(self, method: str, path: str, *headers: str, host: str = "localhost") -> Reply:
        return await ask(self.shim.admin, request(method, path, *headers, host=host))

    async def enrol(self, token: str = "") -> None:
        """The victim: a registered agent for which a command waits."""
        body = {"agent_id": "victim", "name": "victim", "k8s_service_token": SECRET}
        self.cluster_id = (await self.call("POST", f"{BASE}/register", body, token=token)).json["cluster_id"]
        await self.beat(self.cluster_id, token)
        pushed = await self.controller.api.push({"cluster_id": self.cluster_id, "type": "scale"})
        await self.shim.event("command_queued", command=pushed["id"])

    async def beat(self, cluster_id: str, token: str = "") -> Reply:
        return await self.call("POST", f"{BASE}/{cluster_id}/heartbeat", {"agent_id": "a"}, token=token)

    async def poll(self, cluster_id: str, *headers: str, token: str = "", host: str = "localhost") -> Reply:
        return await self.call("GET", f"{BASE}/{cluster_id}/poll", None, *headers, token=token, host=host)

    async def serves(self) -> bool:
        return (await self.call("GET", "/api/v1/health")).status == 200

    def stored(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.folder.glob("agent-shim.db*"))


@asynccontextmanager
async def site(config: dict[str, Any], *options: str) -> AsyncIterator[Site]:
    """A running shim with this configuration."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base: dict[str, Any] = {"poll": {"hold": "off"}, "log": {"level": "debug"}}
        async with world(folder, base | config, "--decoy-token", *options) as (shim, controller):
            await shim.start()
            yield Site(shim, controller, folder)


# --- a process in the pod, and what any client can do to a listener ------------------------------------------------


async def from_the_pod() -> AsyncIterator[Finding]:
    actor = "a process in the pod"
    config = {"listen": {"port": 0, **LIMITS, "max_in_flight_per_session": 2}, "sessions": {"max_per_owner": 4}}
    async with site(config) as it:
        await it.enrol()
        drained = [each["type"] for each in (await it.poll(it.cluster_id)).json["commands"]]
        yield Finding(actor, "polls the agent's commands, no token", f"it gets them: {drained}", known=True)
        replies = [await it.beat(f"flood-{n}") for n in range(6)]
        yield Finding(
            actor,
            "invents agents without end",
            held([reply.status for reply in replies] == [200] * 3 + [503] * 3, f"3 of 6, then {replies[-1].said}"),
        )
        yield Finding(actor, "many requests of one agent at a time", await many_polls(it))
        yield Finding(actor, "takes all connections", await all_connections(it))
        for attack, happened in await slow_ones(it):
            yield Finding(actor, attack, happened)
        for attack, happened in await malformed_ones(it):
            yield Finding(actor, attack, happened)
    async with site({"listen": {"port": 0, "auth": "required"}}) as it:
        await it.enrol(TOKEN)
        replies = [await it.poll(it.cluster_id), await it.poll(it.cluster_id, token="guess")]
        yield Finding(
            actor,
            "the same poll with `listen.auth: required`, no token and a guessed one",
            held([reply.status for reply in replies] == [401, 401], f"{replies[0].said}, twice"),
        )
        limit = resource.prlimit(it.shim.pid, resource.RLIMIT_CORE)
        yield Finding(actor, "makes the shim dump core for the tokens in it", held(limit == (0, 0), f"limit {limit}"))


async def many_polls(it: Site) -> str:
    slow = request("POST", f"{BASE}/{it.cluster_id}/heartbeat", body=b"{}")[:-1]
    lines = [await Line.to(it.shim.url) for _ in range(2)]
    for line in lines:
        await line.send(slow)
    reply = await refused(lambda: it.poll(it.cluster_id))
    for line in lines:
        line.close()
    return held(reply.status == 429, reply.said)


async def all_connections(it: Site) -> str:
    lines = [await Line.to(it.shim.url) for _ in range(40)]
    refused = [line for line in lines[30:] if (await line.reply()).status == 503]
    gone = [await line.closed() for line in lines[:30]]
    for line in lines:
        line.close()
    text = "those beyond the limit get 503; the silent ones are closed, then it serves"
    return held(bool(refused) and all(gone) and await it.serves(), text)


async def slow_ones(it: Site) -> list[tuple[str, str]]:
    line = await Line.to(it.shim.url)
    await line.send(b"GET /api/v1/health HTTP/1.1\r\nX: ")
    head = await line.reply()
    line.close()
    line = await Line.to(it.shim.url)
    await line.send(request("POST", f"{BASE}/{it.cluster_id}/heartbeat", body=b"{" + b" " * 99)[:-50])
    body = await line.reply()
    line.close()
    return [
        ("sends a head that never ends", held(head.status == 408, head.said)),
        ("sends a body that never ends", held(body.status == 408, body.said)),
    ]


async def malformed_ones(it: Site) -> list[tuple[str, str]]:
    path = f"{BASE}/{it.cluster_id}/heartbeat"
    bomb = gzip.compress(b'{"a":"' + b"x" * 50_000_000 + b'"}', 9)
    deep = b"[" * 500_000
    smuggled = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    twice = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n{{}}  "
    tries = [
        ("50 MB in 50 kB of gzip", 413, await it.call("POST", path, bomb, "Content-Encoding: gzip")),
        ("a body of 2 MB", 413, await it.call("POST", path, b'{"a":"' + b"x" * 2_000_000 + b'"}')),
        ("a header of 100 kB", 431, await it.call("GET", "/api/v1/health", None, "X: " + "x" * 100_000)),
        ("half a million brackets", 400, await it.call("POST", path, deep)),
        ("both Content-Length and Transfer-Encoding", 400, await ask(it.shim.url, smuggled.encode())),
        ("two Content-Lengths", 400, await ask(it.shim.url, twice.encode())),
        ("an id with an encoded slash", 400, await it.call("GET", f"{BASE}/..%2f..%2fetc/poll")),
        ("a line break in an id", 400, await it.call("GET", f"{BASE}/a%0d%0ab/poll")),
        ("CONNECT to elsewhere", 405, await ask(it.shim.url, request("CONNECT", "192.0.2.1:80"))),
    ]
    found = [(attack, held(reply.status == status, reply.said)) for attack, status, reply in tries]
    odd = "evil-%22%7d%1b[31m"
    await it.call("POST", f"{BASE}/register", {"agent_id": "x", "name": 'a"}\n{"event":"forged"}\x1b[31m'})
    forged = [line for line in it.shim.lines if "\x1b" in line or line.startswith('{"event":"forged"')]
    found.append(("line breaks and escapes in names, to forge log lines", held(not forged, "one line each, escaped")))
    echo = await it.call("GET", f"/{odd}", None, "X-Request-Id: a\x0bb", "Authorization: Bearer canary canary")
    text = b"canary" not in echo.body and "\x0b" not in echo.headers.get("x-request-id", "")
    found.append(("looks for its own input in an error", held(text, "none of it comes back")))
    return found


# --- another pod ---------------------------------------------------------------------------------------------------


async def from_another_pod() -> AsyncIterator[Finding]:
    actor = "another pod"
    async with site({"listen": {"host": "0.0.0.0", "port": 0, **LIMITS}}) as it:
        it.shim.url = it.shim.url.replace("0.0.0.0", "127.0.0.1")
        await it.enrol(TOKEN)
        replies = [await it.poll(it.cluster_id), await it.poll(it.cluster_id, token="guess"), await it.beat("x")]
        yield Finding(
            actor,
            "calls a listener that is not on loopback, without the token",
            held([reply.status for reply in replies] == [401] * 3, f"{replies[0].said}, poll and heartbeat"),
        )
        said = it.shim.events("listen_without_tls")
        yield Finding(
            actor, "reads its neighbours' plain HTTP", held(bool(said), "warned about at the start"), known=True
        )
        yield Finding(actor, "drains through the admin port", await admin_changes(it))
    own = {
        "listen": {"port": 0},
        "upstream": {"token": "", "heartbeat_interval_s": 2.0},
        "sessions": {"max_per_owner": 9},
    }
    async with site(own) as it:
        await it.enrol(TOKEN)
        yield Finding(actor, "own-token mode: calls without any token", held_401(await it.poll(it.cluster_id)))
        yield Finding(actor, "own-token mode: a token that the controller refuses", await refused_token(it))
        yield Finding(actor, "own-token mode: another accepted token, the victim's cluster id", await other_owner(it))


def held_401(reply: Reply) -> str:
    return held(reply.status == 401, reply.said)


async def admin_changes(it: Site) -> str:
    replies = [
        await it.admin("POST", "/drain"),
        await it.admin("POST", "/commands/x/purge"),
        await it.admin("POST", "/drain", "Authorization: Bearer guess"),
    ]
    return held([reply.status for reply in replies] == [403] * 3, "403, three ways: there is no admin token")


async def refused_token(it: Site) -> str:
    first = await it.beat("cluster-of-a-stranger", "stranger-token")
    reply = await refused(lambda: it.beat("cluster-of-a-stranger", "stranger-token"))
    result = await it.call(
        "POST", f"{BASE}/cluster-of-a-stranger/commands/k/result", {"success": True}, token="stranger-token"
    )
    kept = b"stranger" in it.stored()
    text = f"{first.status} while nobody knows, then {reply.said}; nothing of it on disk"
    return held((reply.status, result.status, kept) == (401, 401, False), text)


async def other_owner(it: Site) -> str:
    reply = await it.poll(it.cluster_id, token="tok-of-another")
    mine = [each["type"] for each in (await it.poll(it.cluster_id, token=TOKEN)).json["commands"]]
    seen = reply.json.get("commands")
    return held(seen in ([], None) and mine == ["scale"], "it sees no command; the victim gets its own")


# --- a browser -----------------------------------------------------------------------------------------------------


async def from_a_browser() -> AsyncIterator[Finding]:
    actor = "a browser on the host"
    async with site({}) as it:
        await it.enrol()
        form = ("Content-Type: text/plain", "Origin: https://evil.example", "Sec-Fetch-Site: cross-site")
        path = f"{BASE}/{it.cluster_id}/commands/k/result"
        tries = [
            ("DNS rebinding: its own name as Host", await it.poll(it.cluster_id, host="evil.example:7080")),
            ("a form posted across sites", await it.call("POST", path, b'{"success":true}', *form)),
            ("`fetch` without CORS", await it.poll(it.cluster_id, "Sec-Fetch-Site: cross-site")),
            ("DNS rebinding of the admin port", await it.admin("GET", "/status.json", host="evil.example:7090")),
            ("a form posted to the admin port", await it.admin("POST", "/drain", *form)),
        ]
        for attack, reply in tries:
            yield Finding(actor, attack, held(reply.status == 403, reply.said))
        page = await it.admin("GET", "/")
        policy = page.headers.get("content-security-policy", "")
        text = "default-src 'none', frame-ancestors 'none', no inline script"
        yield Finding(
            actor,
            "frames the status page or runs script in it",
            held(
                "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy, text
            ),
        )


# --- the controller ------------------------------------------------------------------------------------------------


async def from_the_controller() -> AsyncIterator[Finding]:
    actor = "a hostile controller"
    config = {"commands": {"max_queued": 3}, "upstream": {"heartbeat_interval_s": 2.0, "max_message_bytes": 200_000}}
    async with site(config) as it, trap(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n") as thief:
        await it.controller.control(
            "POST", "/control/faults", {"kind": "gateway", "url": f"ws://localhost:{thief.port}/ws", "count": 1}
        )
        reply = await it.call("POST", f"{BASE}/register", {"agent_id": "victim", "name": "victim"})
        it.cluster_id = reply.json["cluster_id"]
        await it.shim.event("gateway_refused")
        yield Finding(
            actor, "redirects agents to a gateway of another host", held(not thief.heard, "refused, not dialled")
        )
        passed = [word for word in ("decoy", "gateway_ws_url", '"token"') if word in reply.body.decode()]
        yield Finding(actor, "hands a token down with a registration", held(not passed, "the agent never sees it"))
        yield Finding(actor, "frames that are no messages, and messages of the wrong shape", await garbage(it))
        yield Finding(actor, "a message larger than allowed", await too_large(it))
        yield Finding(actor, "more commands than a queue holds", await command_flood(it))
        yield Finding(actor, "opens proxied connections into the cluster", await proxy_request(it))
        commands = (await it.poll(it.cluster_id)).json["commands"]
        yield Finding(
            actor,
            "orders the agent to do harm",
            f"the agent gets {len(commands)} well-formed commands: they are the controller's to give",
            known=True,
        )


async def garbage(it: Site) -> str:
    sends: list[dict[str, Any]] = [
        {"text": "{" * 5000},
        {"text": "[1, 2"},
        {"base64": "//79", "frame": "binary"},
        {
            "message": {
                "type": "command",
                "payload": {"cluster_id": it.cluster_id, "command_id": "../../x", "type": "t"},
            }
        },
        {"message": {"type": "command", "payload": {"cluster_id": it.cluster_id, "command_id": {}, "type": ["t"]}}},
        {"message": {"type": "tunnel_status", "payload": {"cluster_id": it.cluster_id, "forwards": 7}}},
        {"text": '{"type":"command","payload":' + '{"a":' * 3000 + "1" + "}" * 3000 + "}"},
    ]
    for send in sends:
        await it.controller.control("POST", "/control/send", send)
    pushed = await it.controller.api.push({"cluster_id": it.cluster_id, "type": "after"})
    await it.shim.event("command_queued", command=pushed["id"])
    lost = it.shim.events("link_lost")
    return held(not lost, "rejected or counted; the link stays, the next command arrives")


async def too_large(it: Site) -> str:
    after = len(it.shim.lines)
    await it.controller.control(
        "POST", "/control/send", {"text": '{"type":"x","payload":{"a":"' + "y" * 300_000 + '"}}'}
    )
    await it.shim.event("link_state", after, state="waiting")
    await it.shim.event("link_state", after, state="online")
    return held(await it.serves(), "the connection is dropped and dialled again")


async def command_flood(it: Site) -> str:
    await it.beat(it.cluster_id)
    for _ in range(5):
        await it.controller.api.push({"cluster_id": it.cluster_id, "type": "flood"})
    rejected = await it.controller.until(1, type="command_result", direction="in")
    while not any(each["payload"].get("code") == "queue_full" for each in rejected):
        rejected += await it.controller.until(1, rejected[-1]["n"], type="command_result", direction="in")
    return "3 wait, the rest is refused with `queue_full`"


async def proxy_request(it: Site) -> str:
    message = {"type": "proxy_request", "request_id": "p-1", "payload": {"method": "GET", "path": "/api/v1/secrets"}}
    await it.controller.control("POST", "/control/send", {"message": message})
    answers = await it.controller.until(1, type="proxy_error", direction="in")
    return held(answers[0]["request_id"] == "p-1", "refused with `proxy_error`")


# --- a hostile agent -----------------------------------------------------------------------------------------------


async def from_an_agent() -> AsyncIterator[Finding]:
    actor = "a hostile agent"
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    async with trap(answer) as vendor, trap(answer) as inside:
        fallback = {"url": f"http://127.0.0.1:{vendor.port}", "use_upstream_token": True}
        async with site({"mode": "http", "fallback": fallback}) as it:
            for target in (f"http://127.0.0.1:{inside.port}/x", f"//127.0.0.1:{inside.port}/x", "/@127.0.0.1/x"):
                await it.call("GET", target, None, f"X-Forwarded-Host: 127.0.0.1:{inside.port}")
            yield Finding(
                actor,
                "uses the proxy of mode `http` to reach other hosts",
                held(not inside.heard and len(vendor.heard) >= 1, "everything goes to fallback.url"),
            )
            line = await Line.to(it.shim.url)
            await line.send(
                request("GET", "/x", "Connection: X-Api-Key", "X-Api-Key: 1", "Proxy-Authorization: Basic eA==")
            )
            await line.reply()
            line.close()
            passed = [word for word in (b"x-api-key", b"proxy-authorization") if word in vendor.heard[-1].lower()]
            yield Finding(actor, "smuggles hop-by-hop headers through it", held(not passed, "they end at the shim"))
    async with site({}) as it:
        await it.enrol()
        yield Finding(actor, "answers commands it was never given", await unknown_results(it))


async def unknown_results(it: Site) -> str:
    reply = await it.call("POST", f"{BASE}/{it.cluster_id}/commands/never-given/result", {"success": True})
    found = await it.controller.until(1, type="command_result", direction="in")
    return held(
        reply.status == 200 and found[0]["payload"].get("code") == "unknown_command", "forwarded as `unknown_command`"
    )


# --- someone on the path -------------------------------------------------------------------------------------------


async def from_the_path() -> AsyncIterator[Finding]:
    actor = "someone on the path"
    authority, stranger = trustme.CA(), trustme.CA()
    with tempfile.TemporaryDirectory() as name:
        ca_file = Path(name) / "ca.pem"
        authority.cert_pem.write_to_path(ca_file)
        forged = [
            ("a certificate of another authority", certificate(stranger, "localhost")),
            ("a certificate for another name", certificate(authority, "other.example")),
        ]
        for attack, context in forged:
            async with trap(ssl=context) as man:
                text = await dial_fails(f"https://localhost:{man.port}", "tls", ca_file=str(ca_file))
                yield Finding(actor, attack, held(not man.heard, text))
    async with trap() as thief:
        redirect = f"HTTP/1.1 302 F\r\nLocation: ws://127.0.0.1:{thief.port}/\r\nContent-Length: 0\r\n\r\n"
        async with trap(redirect.encode()) as man:
            text = await dial_fails(f"http://127.0.0.1:{man.port}", "status 302")
            await man.visited()
            yield Finding(actor, "redirects the handshake elsewhere", held(not thief.heard, text))
            offered = b"sec-websocket-extensions" in man.heard[0].lower()
            yield Finding(actor, "guesses secrets by compression (CRIME)", held(not offered, "none is offered"))
    done = check_config("upstream.url=http://controller.example")
    yield Finding(actor, "is offered plain `http`/`ws`", held(done.returncode == 2, "the configuration is refused"))


def certificate(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


async def dial_fails(url: str, reason: str, **upstream: str) -> str:
    async with site({"upstream": {"url": url, **upstream}}) as it:
        failed = await it.shim.event("dial_failed")
        serving = await it.serves()
        detail = str(failed["detail"])
        return held(str(failed["reason"]) == reason and serving, f"dial failed: {detail}")


def check_config(*sets: str) -> subprocess.CompletedProcess[str]:
    options = [word for each in sets for word in ("--set", each)]
    command = [sys.executable, "-m", "shim", "check-config", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


# --- someone with the disk -----------------------------------------------------------------------------------------


async def from_the_disk() -> AsyncIterator[Finding]:
    actor = "someone with the disk"
    async with site({"upstream": {"token": ""}}) as it:
        await it.enrol(TOKEN)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in it.folder.glob("agent-shim.db*")}
        yield Finding(actor, "reads the store as another user", held(modes == {0o600}, "mode 0600, every file of it"))
        found = [word for word in (SECRET, TOKEN) if word.encode() in it.stored()]
        yield Finding(actor, "looks for tokens in the store", held(not found, "neither the agent's nor its cluster's"))
        yield Finding(
            actor, "reads command payloads in the store", held(b"scale" in it.stored(), "they are there"), known=True
        )
        yield Finding(actor, "starts a second shim on it, to deliver everything twice", await second_shim(it))
        await it.shim.kill()
        (it.folder / "agent-shim.db").write_bytes(b"not a database" * 1000)
        await it.shim.start()
        said = it.shim.events("store_moved_aside")
        text = "moved aside, said loudly; the shim serves"
        yield Finding(actor, "overwrites the store", held(bool(said) and await it.serves(), text))
        await it.shim.kill()
        target = it.folder / "theirs"
        target.write_bytes(b"theirs")
        (it.folder / "agent-shim.db.lock").unlink()
        (it.folder / "agent-shim.db.lock").symlink_to(target)
        await it.shim.launch()
        code = await it.shim.wait()
        text = f"not followed, exit {code}"
        yield Finding(actor, "plants a link beside it", held(code == 70 and target.read_bytes() == b"theirs", text))


async def second_shim(it: Site) -> str:
    config = {"store": {"path": str(it.folder / "agent-shim.db")}}
    with tempfile.TemporaryDirectory() as name:
        async with Shim(Path(name), config) as second:
            await second.launch()
            code = await second.wait()
            return held(code == 70, f"it ends with {code}: the database is in use")


# --- the table -----------------------------------------------------------------------------------------------------

SCENES: tuple[Callable[[], AsyncIterator[Finding]], ...] = (
    from_the_pod,
    from_another_pod,
    from_a_browser,
    from_the_controller,
    from_an_agent,
    from_the_path,
    from_the_disk,
)


async def attack() -> tuple[list[Finding], list[str]]:
    """All findings, and the breaches among the attempts."""
    findings: list[Finding] = []
    breaches: list[str] = []
    for scene in SCENES:
        try:
            findings += [finding async for finding in scene()]
        except Breach as breach:
            breaches.append(f"{scene.__name__}: {breach}")
    return findings, breaches


def table(findings: list[Finding]) -> str:
    """The findings as they stand in the threat model."""
    rows = ["| who | tries | what happened | |", "|---|---|---|---|"]
    for finding in findings:
        verdict = "known: see [what is not defended](#what-is-not-defended)" if finding.known else "held"
        happened = finding.happened.replace("|", "\\|")
        rows.append(f"| {finding.actor} | {finding.attack} | {happened} | {verdict} |")
    return "\n".join(rows)


def placed(page: str, rows: str) -> str:
    """The page with the table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def main() -> int:
    """Run it; returns the exit code."""
    findings, breaches = asyncio.run(attack())
    print(table(findings))
    for breach in breaches:
        print(f"BREACH {breach}", file=sys.stderr)
    if "--write" in sys.argv and not breaches:
        PAGE.write_text(placed(PAGE.read_text(), table(findings)))
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
