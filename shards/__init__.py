"""Raw datasets -> WebDataset shards -> batches; imports no other package of this project.

packing         pack, packing, execution, writer; layouts, benchmarks, tasks, degrade
others' tars    index, indexing, tars
what is there   manifest, table, inspect
training reads  stream, order, reader, decode, cache, config
for all         storage: folders and object stores; patience: their retries; interrupt; wording
"""
