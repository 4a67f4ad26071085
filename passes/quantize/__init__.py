"""INT8: schemes, ranges and weights of one abstract plan."""
