"""Several replicas on one PostgreSQL (docs/how-to/several-replicas.md): any replica serves any agent, one owns a shard.

Imported only with a `store.url`; needs `agent-shim[postgres]`.
"""
