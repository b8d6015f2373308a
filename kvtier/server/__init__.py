"""SERVES: the daemon (sole builder), gRPC services, sessions and the handing over of arenas."""
