"""The search for N, K, lambda and other fields; imports distributed.

the command     search, config, capacity
which trials    space, sampler, schedulers
a trial         runner is Ray Tune's side of it, trial the training run
what is kept    record: search.json; results, registry
the report      report, plots
"""
