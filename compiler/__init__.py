"""The core: types and the straight line. Knows no pass and no target by name."""
