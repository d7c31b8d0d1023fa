"""Ray Train's trainer, without what shards make needless."""

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback


class ShardTrainer(TorchTrainer):
    """Starts no manager of Ray datasets: samples come from shards.

    That is a process whose imports take seconds at each start, also of a run that lost a worker.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        given = super()._create_default_callbacks()
        return [one for one in given if not isinstance(one, DatasetsCallback)]
