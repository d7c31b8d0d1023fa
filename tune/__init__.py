"""The search for N, K and lambda: imports distributed."""
