"""Training on Ray: imports measnet and shards."""
