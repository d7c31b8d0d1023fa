"""Validation during training: the ranks share the held-out pictures and gather their scores.

All functions are collective: every rank must call them.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from distributed.config import TrainConfig
from distributed.evaluate import held_by
from distributed.scores import EvaluationReport, Grids, Score
from distributed.scoring import Panels, score
from measnet.metrics import FIELD
from measnet.network import MEASNet
from measnet.tiling import Tiling, choose_tiling
from shards.stream import pictures


def agree_on_tiling(model: MEASNet, processes: int) -> Tiling:
    """The tiling of the rank with the least free memory, for all ranks.

    All ranks use the same tiling, so their scores do not depend on how the pictures are shared.

    Args:
        model: on this rank's device.
        processes: number of ranks on this machine.
    """
    own = choose_tiling(model, processes=processes)
    least = torch.tensor([own.at_once], device=next(model.parameters()).device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return own._replace(at_once=int(least.item()))


def validate(
    model: MEASNet, config: TrainConfig, tiling: Tiling, stopping: Callable[[], bool]
) -> tuple[EvaluationReport, Grids] | None:
    """Restore the pictures of `data.validation`.

    Args:
        model: with the weights to validate, on this rank's device.
        config: of the run.
        tiling: from `agree_on_tiling`.
        stopping: whether this rank was asked to stop; asked after each picture.

    Returns:
        The report over all ranks' pictures and a grid per degradation; None if a rank was asked to
        stop, because an incomplete validation is not used.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    uri, limit = config.data.validation, config.every.validation_pictures
    own: list[Score] = []
    panels = Panels(1)
    only = config.every.validation_degradations or None
    source = pictures(uri, limit=limit, degradations=only, data=config.data, rank=rank, world=world)
    for result in score(model, source, tiling, seen=panels.keep):
        own.append(result)
        if stopping():
            break
    stops = torch.tensor([float(stopping())], device=next(model.parameters()).device)
    dist.all_reduce(stops)
    if stops.item():
        return None
    panels.grids.pop("overview", None)  # has pictures of this rank only
    parts: list[tuple[list[Score], Grids]] = [([], {}) for _ in range(world)]
    dist.all_gather_object(parts, (own, panels.grids))
    scores = sorted(one for part, _ in parts for one in part)
    grids = {name: rows for _, part in parts for name, rows in part.items()}
    return EvaluationReport(uri, FIELD, scores, held_by(uri)), grids
