"""Rewrites that keep the function: folds and clean-ups."""
