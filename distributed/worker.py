"""The training loop. Runs in each Ray Train worker, inside the process group that Ray has made."""

from typing import Any

import numpy as np
import torch

from distributed.exchange import Upload
from distributed.optimizer import set_learning_rate
from distributed.profiling import Profiling
from distributed.schedule import learning_rate
from distributed.session import Session
from measnet.losses import restoration_loss
from measnet.selection import fade_noise
from measnet.step_statistics import commit_statistics


def gate_noise(seed: int, step: int, micro_batch: int, device: torch.device) -> torch.Generator:
    """Generator of the gates' noise for one micro-batch, the same on whichever rank it falls."""
    # torch's CPU generators read the low 32 bits of a seed only, so the key is hashed to 32 bits.
    key = np.random.SeedSequence((seed, step, micro_batch)).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(key))


def train_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """One worker's part of a run, from the newest complete checkpoint to the end or a stop.

    Returns what the command that started the run shows at the end; the same on all ranks.
    """
    session = Session(settings)
    config, engine, device = session.config, session.engine, session.device
    weights = config.recipe.balance_weight, config.recipe.frequency_weight
    profiling = Profiling(config, session.rank, device, session.note)
    upload = Upload(device)
    batches = session.batches()
    while not session.over:
        lr = learning_rate(config.recipe, session.samples)
        set_learning_rate(engine, lr)
        if config.model.routing.noise:
            fade_noise(engine.module, session.samples / config.recipe.samples)
        for micro_batch in session.micro_batches:
            batch = next(batches)
            degraded, clean = upload(batch.degraded), upload(batch.clean)
            noise = gate_noise(config.seed, session.step, micro_batch, device)
            graph = session.graph_for(degraded)
            if graph is not None:  # the same passes as one CUDA graph
                session.meter.clock.begin("graph")
                losses, restoration = graph(degraded, clean, noise.initial_seed())
            else:
                restoration = engine(degraded, generator=noise)
                losses = restoration_loss(restoration, clean, *weights)
                session.meter.clock.begin("backward")
                engine.backward(losses.total * session.loss_weight)
            session.meter.clock.begin("update")
            engine.step()  # DeepSpeed updates the weights at the last micro-batch of the step
            session.meter.add(losses, restoration, batch)
        commit_statistics(engine.module, reduce=session.sum_statistics)
        session.count_step()  # the average of the weights follows
        session.report(lr)
        session.skip_left_out_samples()
        profiling.after_step(last=session.over)
        if session.validation_is_due:
            session.validate()
        if session.checkpoint_is_due:
            session.save()
    return session.finish()
