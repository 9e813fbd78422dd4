"""Hypothesis strategies of what the shim may answer: anything the types allow, and what a careless caller adds."""

from hypothesis import strategies as st

from shim.core.agent_calls import Commands, Failed, OfferedCommand, Registered, TunnelState
from shim.protocol import rfc3339

TEXT = st.text(max_size=20)
IDS = st.text("abcXYZ019-._~!$&'()*+,;=:@", min_size=1, max_size=40).filter(lambda ident: ident not in (".", ".."))
MOMENTS = st.datetimes(timezones=st.timezones()).map(lambda moment: moment.isoformat())
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)
OBJECTS = st.dictionaries(TEXT, JSON_VALUES, max_size=4)
REGISTERED = st.builds(
    Registered,
    cluster_id=IDS,
    cluster_uuid=TEXT,
    name=TEXT,
    agent_id=TEXT,
    status=TEXT,
    tunnel_url=TEXT,
    api_server=TEXT,
    workspace_id=st.none() | st.integers() | st.booleans() | st.floats(),
    registered_at=st.none() | MOMENTS | TEXT,
    cached=st.booleans(),
)
COMMANDS = st.builds(
    Commands,
    commands=st.lists(
        st.builds(
            OfferedCommand,
            id=TEXT.filter(bool),
            type=TEXT.filter(bool),
            payload=OBJECTS,
            created_at=MOMENTS.filter(lambda text: rfc3339.parse(text) is not None),
        ),
        max_size=4,
    ).map(tuple),
    poll_frequency_s=st.integers(1, 3600),
)
FORWARDS = st.lists(st.fixed_dictionaries({}, optional={"name": JSON_VALUES, "remote_port": JSON_VALUES}) | JSON_VALUES)
TUNNELS = st.builds(
    TunnelState,
    payload=st.none()
    | st.fixed_dictionaries(
        {},
        optional={
            "status": st.sampled_from(["IDLE", "REQUIRED", "ACTIVE"]) | JSON_VALUES,
            "forwards": FORWARDS | JSON_VALUES,
            "credentials": JSON_VALUES,
            "poll_frequency": JSON_VALUES,
            "tunnel_server_addr": JSON_VALUES,
            "server_fingerprint": JSON_VALUES,
            "Poll_Frequency": JSON_VALUES,
            "other": JSON_VALUES,
        },
    ),
    poll_frequency_s=st.integers(1, 3600),
)
FAILURES = st.builds(
    Failed,
    status=st.sampled_from([400, 401, 403, 404, 405, 408, 409, 413, 429, 500, 502, 503]),
    error=TEXT,
    retry_after_s=st.none() | st.integers(1, 300),
    cluster_id=st.just("") | IDS,
)
