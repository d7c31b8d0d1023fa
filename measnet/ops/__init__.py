"""The network's operations; each chooses by itself whether the compiled library or torch runs."""
