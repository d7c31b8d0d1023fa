"""Machines that the decisions are tested for."""

from measnet.hardware import Card, Machine

GTX_1070 = Card(name="NVIDIA GeForce GTX 1070", memory=8 * 2**30, capability=(6, 1))
RTX_3050 = Card(name="NVIDIA GeForce RTX 3050", memory=8 * 2**30, capability=(8, 6))
T4 = Card(name="Tesla T4", memory=15 * 2**30, capability=(7, 5))
RTX_4090 = Card(name="NVIDIA GeForce RTX 4090", memory=24 * 2**30, capability=(8, 9))
H100 = Card(name="NVIDIA H100 80GB HBM3", memory=80 * 2**30, capability=(9, 0))

NO_GPU = Machine(cores=2)
OLD_DRIVER = Machine(cores=8, problem="the GPU driver is 535.104.05, but torch needs 580")
MACHINES = {
    "no GPU": NO_GPU,
    "old driver": OLD_DRIVER,
    "8 GB": Machine(cores=8, cards=(RTX_3050,)),
    "T4": Machine(cores=4, cards=(T4,)),
    "4090": Machine(cores=16, cards=(RTX_4090,)),
    "H100": Machine(cores=16, cards=(H100,)),
    "8 H100": Machine(cores=128, cards=(H100,) * 8),
}
