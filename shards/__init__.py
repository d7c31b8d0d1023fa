"""Raw datasets -> WebDataset shards -> batches; imports no other package of this project."""
