"""The command store on PostgreSQL: shards of several replicas in one database.

Imported only where `store.url` is set: the driver is an extra.
"""
