"""Status records and how they are shown."""
