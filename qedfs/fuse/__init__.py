"""The only folder that imports pyfuse3."""
