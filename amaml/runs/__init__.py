"""Keeping runs: in memory while they are made, on disk while and after, and what made them."""
