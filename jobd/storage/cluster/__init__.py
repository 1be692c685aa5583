"""The store of a node in a cluster."""
