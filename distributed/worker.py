"""The training loop, on one screen; what it stands on is in `distributed.run`.

Runs in each Ray Train worker, inside the process group that Ray has made.
"""

import time
from typing import Any

from distributed.engine import guarded_optimizer, learning_rate, set_learning_rate
from distributed.run import TrainRun, gate_noise
from measnet.frequency import commit_statistics
from measnet.losses import restoration_loss


def train_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """One worker's part of the run, from the newest whole checkpoint to the end or a wish to stop.

    Returns what the command that started the run shows at the end; the same on all ranks.
    """
    run = TrainRun(settings)
    recipe, engine = run.config.recipe, run.engine
    batches = run.batches()
    while not run.over:
        lr = learning_rate(recipe, run.samples)
        set_learning_rate(engine, lr)
        step = run.samples // recipe.global_batch
        for place in range(run.accumulation):
            waiting_since = time.perf_counter()
            batch = next(batches)
            run.meter.waited(time.perf_counter() - waiting_since)
            noise = gate_noise(run.config.seed, step, run.first_micro_batch + place, run.device)
            restoration = engine(batch.degraded.to(run.device), generator=noise)
            losses = restoration_loss(
                restoration, batch.clean.to(run.device), recipe.balance_weight
            )
            engine.backward(losses.total * run.loss_weight)
            engine.step()  # DeepSpeed updates the weights at the last micro-batch of the step
            run.meter.add(losses, restoration, batch)
        commit_statistics(engine.module, reduce=run.sum_statistics)
        updated = guarded_optimizer(engine).updates > run.updates
        if updated:
            run.updates += 1
            run.average.update(run.updates)
        run.samples += recipe.global_batch
        run.after_step(lr, updated=updated)
    return run.finish()
