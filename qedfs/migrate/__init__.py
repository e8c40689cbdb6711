"""Moving a running machine to this host without copying its disk first: the sequence, and how it is undone (docs/migration.md)."""
