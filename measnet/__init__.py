"""MEASNet, the network, usable alone; imports none of the other packages.

the network     network, in the order of Fig. 2; transformer, prompts (Eq. 1), experts (Eq. 2-6),
                frequency (Eq. 7-10), selection, step_statistics, losses (Eq. 11-12), config
operations      ops/: each in torch, in C for CPUs, in Triton for GPUs; autocast, hardware,
                compile_ahead
the authors'    official/: what only their program computes, and its checkpoints
restoring       restore; decoding, pictures, png16; tiling, windows, features, ensemble
measuring       metrics, complexity, memory, routing
weights         weights, hub, export, spandrel, card; files, errors
libraries       internals: the private parts of torch and DeepSpeed that are used
"""
