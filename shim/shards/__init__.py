"""Several replicas on one NATS cluster: any replica serves any agent, one replica owns each link (docs/scaling.md).

Imported only where `shards.count` is set; needs `agent-shim[nats]`.
"""
