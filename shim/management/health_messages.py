"""Sentences of the health summary: level, text and hint of each.

docs/how-to/diagnose.md#what-the-status-says has the causes; a test compares that table with this list. `health_summary`
decides which sentences apply, and fills in the placeholders in braces.
"""

from __future__ import annotations

from typing import NamedTuple

LEVELS = ("good", "waiting", "warning", "bad")


class Sentence(NamedTuple):
    """One sentence. An empty `hint` means that no action is needed."""

    level: str
    text: str
    hint: str = ""


SENTENCES: dict[str, Sentence] = {
    # --- the process itself ---
    "store_unwritable": Sentence(
        "bad",
        "Not ready: {reason}.",
        "Check the disk of store.path: it may be full, read-only or gone. With store.url: the log says why the database"
        " does not answer.",
    ),
    "stopping": Sentence("warning", "The shim is stopping."),
    "configuration_faulty": Sentence(
        "warning",
        "The configuration file is faulty; the one before it is still in use.",
        "agent-shim check-config lists all faults.",
    ),
    "log_lines_lost": Sentence(
        "warning",
        "{lines} could not be written.",
        "Check that a program reads the log, and that its disk has room.",
    ),
    "store_log_pinned": Sentence(
        "warning",
        "Another program keeps a transaction open on the database: its write-ahead log has grown to {size}.",
        "End that program, for example a backup or a sqlite3 shell; fuser -v FILE names it.",
    ),
    # --- the link ---
    "token_refused": Sentence("bad", "The controller refuses the token ({link}{reason}).", "{hint}"),
    "identity_contended": Sentence(
        "bad",
        "Another process uses the same identity: the controller keeps closing {link}.",
        "Stop the other one: a second shim, or a migrated agent, of the same cluster.",
    ),
    "link_connecting": Sentence("warning", "Connecting to the controller ({link}{reason})."),
    "link_down": Sentence(
        "bad",
        "No connection to the controller for {time}: {link}{reason}. {agents}",
        "agent-shim doctor tests the connection step by step.",
    ),
    # --- what the controller knows ---
    "registration_refused": Sentence(
        "bad",
        "The controller refuses to register {agent} ({status}): {error}.",
        "docs/how-to/diagnose.md#registration-fails explains each status.",
    ),
    "registration_unanswered": Sentence(
        "bad",
        "The controller does not answer the registration of {agent}.",
        "The shim asks again at the agent's next calls. The controller may be overloaded.",
    ),
    "name_unknown": Sentence(
        "bad",
        "The controller does not know {agents}, and the shim has no name to register with.",
        "Set identity.name and restart the shim. With several agents, make each of them register again.",
    ),
    "agent_unknown": Sentence(
        "bad",
        "The controller does not know {agents}: {error}.",
        "The shim sent a registration without success: see register_failed in the log.",
    ),
    "heartbeats_refused": Sentence(
        "bad",
        "The controller refuses the heartbeats of {agents}: {error}.",
        "The controller's text says why. Until then it does not show the agent as connected.",
    ),
    "heartbeats_unacknowledged": Sentence(
        "warning",
        "The controller does not acknowledge the heartbeats of {agents}.",
        "If the controller does not show them as connected, it does not know their cluster ids.",
    ),
    # --- the agents ---
    "not_registered": Sentence(
        "bad",
        "Called, not registered: {agents}.",
        "Restart the agent: it registers only when it starts.",
    ),
    "calls_refused": Sentence("warning", "{calls} refused in the last minute: {kinds}.", "{hint}"),
    "agents_silent": Sentence(
        "warning",
        "{number} silent: {agents}.",
        "The shim sends no heartbeats for a silent agent. Check that its pod runs and calls the shim; "
        "agent-shim forget AGENT removes one that is gone.",
    ),
    "commands_not_fetched": Sentence(
        "warning",
        "Commands wait for agents that do not fetch them: {agents}.",
        "Stock agents never fetch commands; agent-shim purge ID discards one.",
    ),
    "commands_in_doubt": Sentence(
        "warning",
        "{number} in doubt: sent, without evidence that the agent has read it.",
        "The shim sends it again at the agent's next poll, unless commands.at_most_once names its type.",
    ),
    # --- the vendor's HTTP API ---
    "fallback_failing": Sentence(
        "bad", "The vendor's HTTP API did not serve {failed} of {calls} in the last minute: {kinds}.", "{hint}"
    ),
    "fallback_failed": Sentence(
        "bad", "The vendor's HTTP API did not serve the last call, {time} ago: {kinds}.", "{hint}"
    ),
    # --- several replicas ---
    "shards_unowned": Sentence(
        "warning",
        "{number} without an owner: the links are down.",
        "A replica takes them within seconds; if not, see shard_not_opened in its log.",
    ),
    # --- drain ---
    "draining": Sentence(
        "warning", "Draining: {left}; new commands are refused.", "agent-shim drain --cancel ends it."
    ),
    "drain_timed_out": Sentence(
        "bad",
        "The drain did not end in time: {left}.",
        "Wait, purge commands that no agent fetches, or drain again. agent-shim drain --cancel ends it.",
    ),
    "drained": Sentence(
        "warning", "Drained: nothing is left here, and new commands are refused.", "The shim can be stopped."
    ),
    # --- nothing is wrong ---
    "nobody_called": Sentence("waiting", "No agent has called yet. Set the agent's PIPEOPS_API_URL to {url}."),
    "agents_arriving": Sentence("waiting", "{number} called, not registered yet."),
    "no_agent_alive": Sentence("waiting", "No known agent is alive; the link to the controller {link}."),
    "needs_no_shim": Sentence(
        "good",
        "{number} connected by WebSocket, independent of the shim: {agents}.",
        "Give the agent the vendor's own address.",
    ),
    "all_by_http": Sentence("good", "All calls go to the vendor's HTTP API ({url}), because mode is http: {agents}."),
    "replica_without_links": Sentence("good", "This replica serves agents; it owns no agent's link now."),
    "all_well": Sentence("good", "All is well: {link}, {agents}."),
}

PROBLEMS = tuple(code for code, sentence in SENTENCES.items() if sentence.level in ("warning", "bad"))
"""Codes of the metric `agent_shim_health_problem`."""

REFUSED_HINTS = {
    0: "agent-shim doctor tests the connection step by step.",
    400: "The agent's log shows the request; see docs/how-to/diagnose.md#the-agent.",
    401: "Check the agent's token; with listen.auth it must be the shim's own.",
    403: "A browser called, or the Host header is not in listen.allowed_hosts.",
    404: "PIPEOPS_API_URL must be the shim's address alone. A path before /api needs listen.base_path.",
    409: "The cluster's name or id belongs to another agent.",
    410: "The vendor has switched the old API off: its sunset is over.",
    429: "More calls of one agent at once than listen.max_in_flight_per_session allows.",
    431: "The request's head is larger than the shim accepts.",
    502: "The controller, or the vendor's HTTP API, gave no usable answer.",
    503: "The link, the store or the number of agents is the cause; the reason says which.",
}
"""Hints for the most frequent status among rejected calls. Other statuses have no hint."""
