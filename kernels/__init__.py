"""Arithmetic on arrays: the truth that numeric tests compare with. Imports nothing of edgesmith's."""
