"""The `kvtier` command. It speaks to a daemon only through `kvtier.client`."""
