"""How k-means begins, runs and ends: algorithms over any engine."""
