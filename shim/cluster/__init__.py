"""Several replicas on one PostgreSQL: any replica takes any agent's connection, one owns each shard (docs/scaling.md).

Imported only with a `store.url`; needs `agent-shim[postgres]`.
"""
