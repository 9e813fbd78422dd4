"""Sentences of the health summary: level, text and hint of each.

docs/how-to/diagnose.md#what-the-status-says has the causes; a test compares that table with this list. `health_summary`
fills in the placeholders in braces.
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
        "bad", "Not ready: {reason}.", "Look at the disk of store.path: full, read-only, or gone?"
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
        "Does somebody read the log's pipe, and is there room where it goes?",
    ),
    "store_log_pinned": Sentence(
        "warning",
        "Another program reads the database and does not end: the log beside it has grown to {size}.",
        "A backup, or an open sqlite3 shell: fuser -v on the database's file names it.",
    ),
    # --- the link ---
    "token_refused": Sentence("bad", "The controller refuses the token ({link}{reason}).", "{hint}"),
    "identity_contended": Sentence(
        "bad",
        "Another process uses our identity: the controller keeps closing {link}.",
        "Is a second shim, or a migrated agent, running for the same cluster?",
    ),
    "link_connecting": Sentence("warning", "Connecting to the controller ({link}{reason})."),
    "link_down": Sentence(
        "bad",
        "The controller has been away for {time}: {link}{reason}. {agents}",
        "agent-shim doctor tests the way to it step by step.",
    ),
    # --- what the controller knows ---
    "registration_refused": Sentence(
        "bad",
        "The controller refuses to register {agent} ({status}): {error}.",
        "docs/how-to/diagnose.md#registration-fails says what each status means.",
    ),
    "registration_unanswered": Sentence(
        "bad",
        "The controller does not answer the registration of {agent}.",
        "It is asked again with the agent's next calls. Is the controller overloaded?",
    ),
    "name_unknown": Sentence(
        "bad",
        "The controller does not know {agents}, and without a name nothing can be registered.",
        "Set identity.name and restart the shim; with several agents, let each register again.",
    ),
    "agent_unknown": Sentence(
        "bad",
        "The controller does not know {agents}: {error}.",
        "A registration was sent and is not accepted: log register_failed.",
    ),
    "heartbeats_refused": Sentence(
        "bad",
        "The controller refuses the heartbeats of {agents}: {error}.",
        "Its text says why; the agent is not shown as connected meanwhile.",
    ),
    "heartbeats_unacknowledged": Sentence(
        "warning",
        "The controller does not acknowledge the heartbeats of {agents}.",
        "Does it show them as connected? If not, it does not know their cluster id.",
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
        "Nothing is said upstream for an agent that is silent. Is its pod running, and does it call here? "
        "agent-shim forget removes one that is gone.",
    ),
    "commands_not_fetched": Sentence(
        "warning",
        "Commands wait, and their agent does not fetch them: {agents}.",
        "Stock agents never fetch commands; agent-shim purge ID gives one up.",
    ),
    "commands_in_doubt": Sentence(
        "warning",
        "{number} in doubt: offered, and no evidence came that the agent has read it.",
        "Offered again at the agent's next poll, unless commands.at_most_once names its type.",
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
        "{number} without an owner: links are down.",
        "Taken by a replica within seconds; if not, see its log (shard_not_opened).",
    ),
    # --- drain ---
    "draining": Sentence(
        "warning", "Draining: {left}; new commands are refused.", "agent-shim drain --cancel ends it."
    ),
    "drain_timed_out": Sentence(
        "bad",
        "The drain did not end in time: {left}.",
        "Wait, purge what nobody fetches, or drain again; agent-shim drain --cancel takes commands again.",
    ),
    "drained": Sentence(
        "warning", "Drained: nothing is left here, and new commands are refused.", "It can be stopped."
    ),
    # --- nothing is wrong ---
    "nobody_called": Sentence("waiting", "Nobody has called yet: point the agent's PIPEOPS_API_URL at {url}."),
    "agents_arriving": Sentence("waiting", "{number} called and registered nothing yet."),
    "no_agent_alive": Sentence("waiting", "No known agent is alive; the link to the controller {link}."),
    "needs_no_shim": Sentence(
        "good", "{number} by WebSocket, without need of the shim: {agents}.", "Give the agent the vendor's own address."
    ),
    "all_by_http": Sentence("good", "All calls go by the vendor's HTTP API ({url}), as mode http says: {agents}."),
    "replica_without_links": Sentence("good", "This replica serves agents; it owns no agent's link now."),
    "all_well": Sentence("good", "All is well: {link}, {agents}."),
}

PROBLEMS = tuple(code for code, sentence in SENTENCES.items() if sentence.level in ("warning", "bad"))
"""Codes of the metric `agent_shim_health_problem`."""

REFUSED_HINTS = {
    0: "agent-shim doctor tests the way to it step by step.",
    400: "The agent's log has the request; docs/how-to/diagnose.md#the-agent.",
    401: "The token: the agent's, and with listen.auth the one that the shim expects.",
    403: "A browser, or a Host header that is not ours: listen.allowed_hosts.",
    404: "Is PIPEOPS_API_URL the shim's address alone? A path before /api needs listen.base_path.",
    409: "The cluster's name or id belongs to another agent.",
    410: "The old API is gone there: its sunset is over.",
    429: "More calls of one agent at once than listen.max_in_flight_per_session allows.",
    431: "The request's head is larger than the shim takes.",
    502: "The controller, or the vendor's HTTP API, did not give a usable answer.",
    503: "The link, the store or the number of agents: the reason says which.",
}
"""Hints for the most frequent status among rejected calls. Other statuses have no hint."""
