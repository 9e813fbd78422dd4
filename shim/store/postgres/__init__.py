"""Command store on PostgreSQL: the shards of several replicas in one database.

Imported only if `store.url` is set, because the driver is an extra.
"""
