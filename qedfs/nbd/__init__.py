"""The NBD protocol, both sides, and the read-only server."""
