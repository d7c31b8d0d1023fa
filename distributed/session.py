"""The state of a run in one worker: set up, resume, report, validate, save, finish.

All changes of the state of a run are here; `distributed.worker` is the loop that makes them.
"""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from distributed.access import check_storage
from distributed.checkpoint import Checkpoint, RunState, Snapshot, newest_complete
from distributed.checkpoint_writer import CheckpointWriter
from distributed.cluster import own_device
from distributed.compilation import compile_blocks, compile_kernels
from distributed.config import TrainConfig
from distributed.decisions import accumulation_steps, choose_reduction, sharing_workers
from distributed.engine import decide_for, initialize
from distributed.environment import keep_environment, record_environment
from distributed.exchange import Exchange, Step, StepSums, curve_point
from distributed.graphs import GraphError, MicroBatchGraph, graph_micro_batches
from distributed.guard import (
    StepGuard,
    chain,
    log_line,
    routing_warnings,
    watch_unused,
)
from distributed.initial import start_from
from distributed.internals.deepspeed import version_warning
from distributed.meter import Meter
from distributed.mlflow_tracker import RESUMED_S, Tracker
from distributed.optimizer import guarded_optimizer
from distributed.preemption import NoticeWatcher, which_cloud
from distributed.progress import Reporter
from distributed.run_log import RunLog
from distributed.scores import write
from distributed.sharded_state import (
    WeightAverage,
    load_optimizer_state,
    optimizer_state,
    weights,
)
from distributed.speed import Speed, flops_per_sample, timed
from distributed.validation import agree_on_tiling, validate
from measnet.config import from_dict, to_dict
from measnet.hardware import card_of
from measnet.network import MEASNet
from measnet.routing import drift
from measnet.tiling import Tiling
from shards import patience
from shards.reader import DamagedError
from shards.stream import Batch, TrainStream


class Session:
    """One worker's view of a run, from a start or restart to its end or the next failure."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Set up everything, and resume from the newest complete checkpoint.

        The order of resuming:
        1. rank 0 finds the newest complete checkpoint; all ranks take the same one
        2. weights and buffers go into the bare network, before DeepSpeed shards it
        3. DeepSpeed's engine; then Adam's moments into what each rank keeps of them
        4. the average of the weights
        5. the counts of samples and updates; the stream of samples begins at that position
        """
        self._started: float | None = time.perf_counter()
        self.config = from_dict(TrainConfig, settings["config"])
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = own_device(settings["device"])
        self._folder = self.config.folder
        self._reporter = Reporter(
            settings["monitor"],
            self.rank,
            self.world,
            on_hang=lambda line: self._log.event(line) if self.rank == 0 else None,
        )
        patience.listen(lambda line: self._reporter.say(line, from_any_rank=True))
        check_storage(self.config.storage)
        self._log = RunLog(self._folder, self.rank)
        patience.listen(lambda line: self.note(f"rank {self.rank}: {line}", from_any_rank=True))
        self._stream = TrainStream(self.config.data, self.config.seed)

        card = card_of(self.device)
        decisions = decide_for(self.device, self.config, self.world)
        self._accumulation = accumulation_steps(self.config.recipe, self.world)
        # An idle worker computes what another one computes, with a weight of 0: DeepSpeed's
        # collective calls need all ranks.
        self._sharing = sharing_workers(self.config.recipe, self.world)
        self._idle = self.rank >= self._sharing
        self._slice = self.rank % self._sharing
        self._first_micro_batch = self._slice * self._accumulation
        self.loss_weight = 0.0 if self._idle else self.world / self._sharing

        first_on_node = context.get_local_rank() == 0
        compile_kernels(self.config, decisions, first_on_node=first_on_node)
        found = self._agree_on_checkpoint()
        state = found.state() if found else None
        torch.manual_seed(self.config.seed)
        model = MEASNet(self.config.model).to(self.device)
        model.defer_statistics = True
        model.activation_checkpointing = decisions.checkpointing.choice == "on"
        if decisions.compile.choice == "on":
            decisions = decisions._replace(compile=compile_blocks(model, self.device))
        if found:
            model.load_state_dict(found.tensors("weights"))
        elif self.config.init:
            start_from(self.config.init, model)
        name_unused: Callable[[], list[str]] = watch_unused(model)
        self.engine = initialize(self.config, decisions, model)
        self.graph, graphs = graph_micro_batches(
            self.engine,
            self.config,
            decisions,
            self.loss_weight / self._accumulation,
            state.samples if state else 0,
        )
        reduction = choose_reduction(self.config.engine.zero_stage, self.world, graphs)
        decisions = decisions._replace(graphs=graphs, reduction=reduction)
        if self.graph is not None:
            name_unused = partial(list, self.graph.unused)
        self.average = WeightAverage(self.engine, self.config.recipe.ema_decay)
        if found and state:
            load_optimizer_state(self.engine, found.tensors("optimizer"), state.updates)
            self.average.load(found.tensors("ema"))
        optimizer = guarded_optimizer(self.engine)
        self._guard = StepGuard(self.config, optimizer, name_unused, self.note)
        self.samples = self._guard.skips.after_skipped(state.samples if state else 0)
        self._before = self.samples
        self._shape = torch.Size()
        self.updates = state.updates if state else 0
        self._consumed = state.consumed if state else ""
        self._best = state.best if state else None
        self._validations = list(state.validations) if state else []
        self._validation = dict(state.validation) if state else {}
        self._mlflow_run_id = settings["tracking"].id or None

        self.meter = Meter(self.device, counts=not self._idle)
        self._multiply_adds: float = settings["multiply_adds"]
        self._speed = Speed(self.world, card)
        self._late = self.device.type == "cuda"
        self._exchange = Exchange(self.device, late=self._late)
        self._damaged = 0
        self.stop_reason = ""
        self._noticed = False
        cloud = which_cloud(self.config.scaling.preemption_notice) if first_on_node else "off"
        self._notice = NoticeWatcher(cloud, lambda line: self.note(line, from_any_rank=True))
        self._tiling: Tiling | None = None
        self._tracker: Tracker | None = None
        self._writer: CheckpointWriter | None = None
        if self.rank == 0:
            self._log.resume(state.samples if state else 0)
            self._reporter.start_at(self.samples)
            self._writer = CheckpointWriter(
                self._folder, self.config.every.keep_checkpoints, self._log, settings["owner"]
            )
            self._tracker = Tracker(
                self._log,
                settings["tracking"],
                first_s=RESUMED_S if found else None,
                card=self.device if card else None,
            )
        self._say_start(decisions._asdict(), found)
        driver = settings["driver_process"]
        environment, changes = record_environment(self.device, driver, self._folder)
        if changes:
            self.note(f"resumed on other hardware: {', '.join(changes)}")
        if self._tracker:
            kept = keep_environment(environment, self._log.folder, self.samples)
            self._tracker.artifact(kept, "environment")  # with those of earlier starts

    @property
    def over(self) -> bool:
        """Whether the last step was made, or the run was asked to stop."""
        return self.samples >= self._end or bool(self.stop_reason)

    @property
    def step(self) -> int:
        """Number of the optimizer step that comes next, from 0."""
        return self.samples // self.config.recipe.global_batch

    @property
    def micro_batches(self) -> range:
        """This rank's micro-batches of a step, as their numbers in the global batch."""
        return range(self._first_micro_batch, self._first_micro_batch + self._accumulation)

    @property
    def _end(self) -> int:
        return self.config.recipe.steps * self.config.recipe.global_batch

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches, from where the run stands to its end."""
        recipe, at = self.config.recipe, self.samples
        sizes = {"global_batch": recipe.global_batch, "micro_batch": recipe.micro_batch}
        part = {"world": self._sharing, "rank": self._slice}
        floats = self.device.type == "cpu"  # a GPU converts bytes itself: a quarter of the transfer
        for first, behind in [*self._guard.skips.spans, (self._end, self._end)]:
            if at < first:
                batches = self._stream.batches(at, first, **sizes, **part, floats=floats)
                yield from self._watched(batches)
            at = max(at, behind)

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Note what this rank does: wait for a batch, then compute with it."""
        while True:
            self._reporter.enter("data", self.step + 1)
            with self.meter.waiting():
                batch = next(batches, None)
            self._reporter.enter("step")
            if batch is None:
                return
            yield batch

    def graph_for(self, degraded: Tensor) -> MicroBatchGraph | None:
        """The CUDA graph for pictures of this shape; None where there is none.

        Where crops of another side cannot be captured, the run goes on without graphs.
        """
        if degraded.shape != self._shape:
            self._reporter.expect_compilation()
            self._shape = degraded.shape
        if self.graph is not None:
            try:
                self.graph.prepare(degraded.shape)
            except GraphError as error:
                self.graph = None
                side = degraded.shape[-1]
                line = f"graphs: off from {self.samples:,} samples on, crops of {side} ({error})"
                self.note(line, from_any_rank=True)
        return self.graph

    def sum_statistics(self, flat: Tensor) -> None:
        """Add up the batch norms' sums over the ranks that share the work, in place."""
        if self._idle:
            flat.zero_()
        dist.all_reduce(flat)

    def count_step(self) -> None:
        """Count the samples of the step, and let the average follow if it updated the weights."""
        self._before = self.samples
        self.samples += self.config.recipe.global_batch
        optimizer = guarded_optimizer(self.engine)
        if self._late:
            self.average.update_on_device(optimizer)
        elif optimizer.applied.item():
            self.average.update(self.updates + 1)

    def report(self, lr: float) -> None:
        """Add up over the ranks, look at the numbers, and show where the run is.

        On a GPU the numbers are those of the step before, except where something else follows
        that depends on them.

        Args:
            lr: learning rate of the step.

        Raises:
            GoBackError: too many steps in a row were skipped.
            DamagedError: more corrupt samples than `data.corrupt_budget`.
        """
        if self._started is not None:
            seconds, self._started = time.perf_counter() - self._started, None
            self._reporter.say(f"first step {seconds:.1f} s after the worker started")
            self.keep_metrics({"speed/first_step_s": seconds}, self.samples)
        self._start_exchange(lr)
        self._reporter.step_made()
        every = self.config.every
        needed = self._after_skipped >= self._end or any(
            interval and self._crossed(interval) for interval in (every.validate, every.checkpoint)
        )
        for step, sums in self._exchange.finished(everything=needed):
            self._account(step, sums)
        if self.stop_reason or self._noticed:  # a checkpoint follows
            for step, sums in self._exchange.finished(everything=True):
                self._account(step, sums)

    def _account(self, step: Step, sums: StepSums) -> None:
        """Note what a step did, and what was wrong with it."""
        self.updates += sums.updated
        self._count_damage(sums.damaged)
        if sums.stops:
            self.stop_reason = self._reporter.stop_reason or "asked to stop"
        self._noticed |= sums.noticed
        self._log_consumed(step, sums.digests)
        self._guard.after_step(step, sums)
        skipped = step.samples // self.config.recipe.global_batch - self.updates
        metrics = curve_point(step, sums, world=self.world, skipped=skipped)
        crop = self.config.data.crop_at(step.samples - self.config.recipe.global_batch)
        flops = flops_per_sample(self._multiply_adds, crop)
        share = self.graph.forward_share if self.graph else None
        metrics |= self._speed.after_step(
            metrics, step.marks, flops=flops, last=step.ends_point, forward_share=share
        )
        checkpoint_s = self._writer.seconds if self._writer else 0.0
        self._reporter.update({"samples": step.samples, "checkpoint_s": checkpoint_s, **metrics})
        if step.ends_point or self.stop_reason:
            self.keep_metrics(metrics, step.samples)

    @property
    def validation_is_due(self) -> bool:
        """Whether to validate after this step: at the end always, unless somebody asked to stop."""
        every = self.config.every.validate
        due = self.samples >= self._end or bool(every and self._crossed(every))
        return due and not self.stop_reason

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether to save after this step: at the end always, but not between skipped updates.

        Also as soon as the cloud takes a node away.

        While updates are skipped the weights themselves may be wrong, so the run must not resume
        from them.
        """
        if self.over:
            return True
        validated = self._validation.get("at") == self.samples
        due = self._noticed or validated or self._crossed(self.config.every.checkpoint)
        return due and not self._guard.skips.in_a_row

    def skip_left_out_samples(self) -> None:
        """Continue after samples that earlier skipped updates left out."""
        self.samples = self._after_skipped

    def finish(self) -> dict[str, Any]:
        """Hand over what is still to be sent, and say how the run ended."""
        self._reporter.enter("end")
        if self._writer:
            self._writer.wait()
        if self._tracker:
            self._tracker.close()
        self._notice.close()
        self._log.close()
        self._reporter.close()
        return {
            "samples": self.samples,
            "finished": self.samples >= self._end,
            "stop_reason": self.stop_reason,
            "skipped_updates": self.samples // self.config.recipe.global_batch - self.updates,
            "validation": self._validation,
        }

    # ---- parts -----------------------------------------------------------------------------------

    def _crossed(self, interval: int) -> bool:
        """Whether the step, or the samples left out after it, passed a multiple of `interval`."""
        return self._after_skipped // interval > self._before // interval

    @property
    def _after_skipped(self) -> int:
        """The position of the run; if it is in a span that is left out, the end of that span."""
        return self._guard.skips.after_skipped(self.samples)

    def _agree_on_checkpoint(self) -> Checkpoint | None:
        found = [newest_complete(self._folder, self.note) if self.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _start_exchange(self, lr: float) -> None:
        meter, recipe = self.meter, self.config.recipe
        for what in meter.damage:
            self.note(f"rank {self.rank}: replaced a corrupt sample: {what}", from_any_rank=True)
        damaged = len(meter.damage)
        keys, own = meter.end_step()
        digests = [0] * recipe.micro_batches
        digests[self._first_micro_batch : self._first_micro_batch + len(own)] = own
        ends_point = self.samples >= self._end or self._crossed(self.config.every.log)
        if notice := self._notice.take():
            self.note(f"rank {self.rank}: {notice}; saving a checkpoint", from_any_rank=True)
        # Rank 0 is never idle, and only what rank 0 counts is shown.
        seen = meter.micro_batches * self._sharing * recipe.micro_batch
        seconds = time.perf_counter() - meter.started
        self._exchange.start(
            Step(self.samples, lr, keys, ends_point, seen, seconds, meter.clock.end_step()),
            meter.sums(),
            guarded_optimizer(self.engine).applied,
            wait_s=meter.wait_s,
            stops=bool(self._reporter.stop_reason),
            noticed=bool(notice),
            damaged=damaged,
            digests=digests,
        )
        if ends_point:
            meter.reset()

    def _count_damage(self, damaged: int) -> None:
        """Of all ranks, so that the budget does not depend on their number."""
        self._damaged += damaged
        if self._damaged > (budget := self.config.data.corrupt_budget):
            raise DamagedError(
                f"{self._damaged} samples were damaged since the start, more than "
                f"data.corrupt_budget = {budget}",
                "see all damage by `python -m shards.inspect "
                f"{shlex.quote(self.config.data.train)}`",
            )

    def _log_consumed(self, step: Step, digests: list[int]) -> None:
        """Add the step to the chained digest, and to the log of consumed samples."""
        self._consumed = chain(self._consumed, digests)
        if self.rank == 0:
            self._log.consumed(log_line(step.samples, self._consumed, digests, time.time()))

    def note(self, line: str, *, from_any_rank: bool = False) -> None:
        """Show a line, and keep it among the events that MLflow gets."""
        self._reporter.say(line, from_any_rank=from_any_rank)
        if self.rank == 0 or from_any_rank:
            self._log.event(line)

    def _say_start(self, decisions: Mapping[str, Any], found: Checkpoint | None) -> None:
        if warning := version_warning():
            self._reporter.say(f"warning: {warning}")
        for name, decision in decisions.items():
            self._reporter.say(f"{name}: {decision.choice} ({decision.reason})")
        if found:
            self.note(f"resumed from checkpoint {found.name}: {self.samples:,} samples")

    def _averaged_weights(self) -> dict[str, Tensor]:
        with self.average.in_place():
            return weights(self.engine)

    def keep_metrics(self, metrics: Mapping[str, float], samples: int) -> bool:
        """Record metrics after this many samples; whether they are new, on rank 0."""
        return bool(self._tracker and self._tracker.metrics(metrics, samples))

    @timed("speed/validate_s")
    def validate(self) -> None:
        """Restore held-out pictures with the averaged weights; each rank takes a part of them."""
        self._reporter.enter("validation")
        model = MEASNet(self.config.model)
        model.load_state_dict(self._averaged_weights())
        model.to(self.device).eval()
        if self._tiling is None:  # once, so that the figures of all validations can be compared
            beside = ray.train.get_context().get_local_world_size()
            self._tiling = agree_on_tiling(model, beside)
            self._reporter.say(f"validation: {self._tiling.decision}")
        done = validate(model, self.config, self._tiling, self._stops_after_picture)
        if done is None:
            self.stop_reason = self._reporter.stop_reason or "asked to stop"
            return
        report, grids = done
        mean = report.mean.restored_psnr
        self._best = mean if self._best is None else max(self._best, mean)
        self._validations.append((self.samples, mean))
        before = self._validation.get("report", {}).get("routing", {})
        moved = {f"val_drift/{name}": far for name, far in drift(before, report.routing).items()}
        self._validation = {"at": self.samples, "psnr": mean, "report": report.as_dict()}
        for warning in routing_warnings(self.meter.take_usage(), self.config.model):
            self.note(warning)
        new = self.keep_metrics(report.metrics() | moved, self.samples)
        if self._tracker:
            folder = self._log.folder / "validation" / f"{self.samples:012d}"
            write(report, grids, folder)
            self._tracker.artifact(folder, f"validation/{self.samples:012d}")
            for name in grids if new else ():  # the same pictures each time
                path = folder / "grids" / f"{name}.png"
                self._tracker.picture(path, f"validation/{name}", self.samples)
        by_task = "  ".join(
            f"{t} {s.input_psnr:.2f} -> {s.restored_psnr:.2f}" for t, s in report.tasks.items()
        )
        self._reporter.say(f"validation at {self.samples:,} samples, PSNR in dB: {by_task}")

    def _stops_after_picture(self) -> bool:
        self._reporter.made_progress()
        return bool(self._reporter.stop_reason)

    @timed("speed/save_s")
    def save(self) -> None:
        """Take a snapshot, which is written while training continues; a collective call."""
        self._reporter.enter("checkpoint")
        self._noticed = False
        score = self._validation["psnr"] if self._validation.get("at") == self.samples else None
        state = RunState(
            samples=self.samples,
            updates=self.updates,
            config=to_dict(self.config),
            data=self._stream.reader.manifest.fingerprint,
            plan=self._stream.plan.description,
            consumed=self._consumed,
            best=self._best,
            score=score,
            validations=list(self._validations),
            validation=self._validation,
            mlflow_run_id=self._mlflow_run_id,
            finished=self.samples >= self._end,
        )
        snapshot = Snapshot(
            state, weights(self.engine), self._averaged_weights(), optimizer_state(self.engine)
        )
        if self._writer:
            self._writer.submit(snapshot)
