"""Raw datasets -> WebDataset shards -> batches; imports nothing of the other rooms."""
