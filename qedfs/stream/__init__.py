"""Streaming: when the background copies, how fast, what next, and the job that does it. Policy: docs/streaming.md."""
