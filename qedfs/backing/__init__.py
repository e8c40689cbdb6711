"""Byte sources by transport and format, with retry, identity and policy."""
