"""Several replicas on one PostgreSQL (docs/how-to/several-replicas.md).

Any replica serves any agent; each shard is owned by one replica. Imported only with a `store.url`; needs
`agent-shim[postgres]`.
"""
