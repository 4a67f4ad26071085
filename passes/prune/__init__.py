"""Structured pruning: how much each unit matters, which units go, and the pass."""
