"""What a worker's training loop stands on: set up, resume, report, validate, checkpoint, finish."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode
from torch import Tensor

from distributed.checkpoint import Checkpoint, RunState, Snapshot, newest_whole, prune
from distributed.config import TrainConfig
from distributed.engine import (
    WeightAverage,
    decide,
    initialize,
    load_optimizer_state,
    optimizer_state,
    weights,
)
from distributed.evaluate import EvaluationReport, Score, score, share
from distributed.monitor import Reporter
from distributed.tracking import Tracker
from measnet.config import from_dict, to_dict
from measnet.losses import Losses
from measnet.metrics import FIELD
from measnet.network import MEASNet, Restoration
from shards.stream import Batch, TrainStream, pictures


def gate_noise(seed: int, step: int, micro_batch: int, device: torch.device) -> torch.Generator:
    """Generator of the gates' noise for one micro-batch, the same on whichever rank it falls."""
    # torch's CPU generators read the low 32 bits of a seed only, so the key is hashed to 32 bits.
    key = np.random.SeedSequence((seed, step, micro_batch)).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(key))


class Meter:
    """Sums over the micro-batches of one rank since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        """Nothing yet."""
        self._device = device
        self._usage: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Begin the next point of the curves."""
        self._losses = torch.zeros(3, dtype=torch.float64, device=self._device)
        self._micro_batches = 0
        self._data_wait = 0.0
        self.started = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for a batch."""
        self._data_wait += seconds

    def add(self, losses: Losses, restoration: Restoration) -> None:
        """Count one micro-batch; stays on the device, so that nobody waits for it."""
        self._losses += torch.stack([loss.detach() for loss in losses]).double()
        self._micro_batches += 1
        for library, share_bn in restoration.routing.items():
            chosen = share_bn.detach().double().sum(0)
            self._usage[library] = (
                self._usage[library] + chosen if library in self._usage else chosen
            )

    def sums(self) -> Tensor:
        """Total, l1 and balance loss, micro-batches, seconds of waiting: (5,) float64."""
        counts = torch.tensor([self._micro_batches, self._data_wait], dtype=torch.float64)
        return torch.cat([self._losses, counts.to(self._device)])

    def take_usage(self) -> dict[str, list[float]]:
        """How much each expert of each library was chosen since the last call; a collective
        call."""
        if not self._usage:
            return {}
        flat = torch.cat(list(self._usage.values()))
        dist.all_reduce(flat)
        parts = flat.split([u.numel() for u in self._usage.values()])
        usage = {library: part.tolist() for library, part in zip(self._usage, parts, strict=True)}
        self._usage = {}
        return usage


class TrainRun:
    """One worker's view of a run, from a start or restart to its end or the next failure."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Set up everything, and take up the run where its newest whole checkpoint left it.

        The order of resuming:
        1. rank 0 finds the newest checkpoint that is whole; all ranks take the same one
        2. weights and buffers go into the bare network, before DeepSpeed shards it
        3. DeepSpeed's engine; then Adam's moments into what each rank keeps of them
        4. the average of the weights
        5. the counts of samples and updates; the stream of samples begins at that position
        """
        self.config = from_dict(TrainConfig, settings["config"])
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._folder = self.config.folder
        self._reporter = Reporter(settings["monitor"], speaks=self.rank == 0)
        self._stream = TrainStream(self.config.data, self.config.seed)

        decisions = decide(self.config, self.world, self.device)
        self.accumulation = int(decisions.accumulation.choice)
        self.first_micro_batch = self.rank * self.accumulation

        found = self._agree_on_checkpoint()
        state = found.state() if found else None
        torch.manual_seed(self.config.seed)
        model = MEASNet(self.config.model).to(self.device)
        model.defer_statistics = True
        model.activation_checkpointing = self.config.engine.activation_checkpointing
        if found:
            model.load_state_dict(found.tensors("weights"))
        self.engine = initialize(self.config, decisions, model)
        self.average = WeightAverage(self.engine, self.config.recipe.ema_decay)
        if found and state:
            load_optimizer_state(self.engine, found.tensors("optimizer"), state.updates)
            self.average.load(found.tensors("ema"))
        self.samples = state.samples if state else 0
        self.updates = state.updates if state else 0
        self._best = state.best if state else None
        self._mlflow_run_id = settings["tracking"].id or None

        self.meter = Meter(self.device)
        self.stop_reason = ""
        self._validation: dict[str, Any] = {}
        self._tracker: Tracker | None = None
        if self.rank == 0:
            self._tracker = Tracker(Path(settings["tracking_folder"]), settings["tracking"])
        self._say_start(decisions._asdict(), found)

    @property
    def over(self) -> bool:
        """Whether the last step was made, or somebody asked to stop."""
        return self.samples >= self._end or bool(self.stop_reason)

    @property
    def _end(self) -> int:
        return self.config.recipe.steps * self.config.recipe.global_batch

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches, from where the run stands to its end."""
        recipe = self.config.recipe
        return self._stream.batches(
            self.samples,
            self._end,
            global_batch=recipe.global_batch,
            micro_batch=recipe.micro_batch,
            world=self.world,
            rank=self.rank,
        )

    def after_step(self, lr: float) -> None:
        """Report, validate and save where it is time; learn on all ranks at once whether to
        stop."""
        every = self.config.every
        sums = self.meter.sums()
        wanted = torch.tensor([float(bool(self._reporter.stop_reason))], dtype=torch.float64)
        agreed = torch.cat([sums, wanted.to(self.device)])
        dist.all_reduce(agreed)
        *sums_all, stops = agreed.tolist()
        if stops:
            self.stop_reason = self._reporter.stop_reason or "asked to stop"
        metrics = self._metrics(sums_all, lr)
        self._reporter.update({"samples": self.samples, **metrics})
        if self._crossed(every.log) or self.over:
            if self._tracker:
                self._tracker.metrics(metrics, self.samples)
            self.meter.reset()
        if not self.stop_reason and (
            self.samples >= self._end or (every.validate and self._crossed(every.validate))
        ):
            self._validate()
        if (
            self._crossed(every.checkpoint)
            or self.over
            or self._validation.get("at") == self.samples
        ):
            self._save()

    def finish(self) -> dict[str, Any]:
        """Hand over what is still to be sent, and say how the run ended."""
        if self._tracker:
            self._tracker.close()
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
        """Whether the last step reached or passed a multiple of `interval` samples."""
        before = self.samples - self.config.recipe.global_batch
        return self.samples // interval > before // interval

    def _agree_on_checkpoint(self) -> Checkpoint | None:
        found = [newest_whole(self._folder, self._reporter.say) if self.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _say_start(self, decisions: Mapping[str, Any], found: Checkpoint | None) -> None:
        for name, decision in decisions.items():
            self._reporter.say(f"{name}: {decision.choice} ({decision.reason})")
        if found:
            self._reporter.say(f"going on from checkpoint {found.name}: {self.samples:,} samples")

    def _metrics(self, sums: list[float], lr: float) -> dict[str, float]:
        total, l1, balance, micro_batches, data_wait = sums
        seconds = time.perf_counter() - self.meter.started
        return {
            "train/loss": total / micro_batches,
            "train/l1": l1 / micro_batches,
            "train/balance": balance / micro_batches,
            "train/learning_rate": lr,
            "speed/samples_per_s": micro_batches * self.config.recipe.micro_batch / seconds,
            "speed/data_wait": min(1.0, data_wait / self.world / seconds),
        }

    def _averaged_weights(self) -> dict[str, Tensor]:
        with self.average.in_place():
            return weights(self.engine)

    def _validate(self) -> None:
        """Restore held-out pictures with the averaged weights; the ranks share them out."""
        model = MEASNet(self.config.model)
        model.load_state_dict(self._averaged_weights())
        model.to(self.device).eval()
        data, limit = self.config.data.validation, self.config.every.validation_pictures
        own: list[Score] = []
        numbered = share(enumerate(pictures(data, limit=limit)), self.rank, self.world)
        for result in score(model, numbered, device=self.device):
            own.append(result)
            if self._reporter.stop_reason:
                break
        unfinished = torch.tensor([float(bool(self._reporter.stop_reason))], device=self.device)
        dist.all_reduce(unfinished)
        if unfinished.item():
            self.stop_reason = self._reporter.stop_reason or "asked to stop"
            return  # half a validation is none
        gathered: list[list[Score]] = [[] for _ in range(self.world)]
        dist.all_gather_object(gathered, own)
        report = EvaluationReport(data, FIELD, sorted(s for part in gathered for s in part))
        mean = report.mean.restored_psnr
        self._best = mean if self._best is None else max(self._best, mean)
        self._validation = {"at": self.samples, "psnr": mean, "report": report.as_dict()}
        self._warn_of_idle_experts()
        if self._tracker:
            self._tracker.metrics(report.metrics(), self.samples)
        by_task = "  ".join(
            f"{t} {s.input_psnr:.2f} -> {s.restored_psnr:.2f}" for t, s in report.tasks.items()
        )
        self._reporter.say(f"validation at {self.samples:,} samples, PSNR in dB: {by_task}")

    def _warn_of_idle_experts(self) -> None:
        for library, usage in self.meter.take_usage().items():
            idle = [str(n) for n, chosen in enumerate(usage) if chosen == 0]
            if idle:
                self._reporter.say(
                    f"warning: experts {', '.join(idle)} of {library} were not chosen once "
                    "since the last validation"
                )

    def _save(self) -> None:
        """Take a snapshot; Ray's upload thread writes it while training goes on."""
        score = self._validation["psnr"] if self._validation.get("at") == self.samples else None
        state = RunState(
            samples=self.samples,
            updates=self.updates,
            config=to_dict(self.config),
            data=self._stream.reader.manifest.fingerprint,
            plan=self._stream.plan.description,
            best=self._best,
            score=score,
            mlflow_run_id=self._mlflow_run_id,
            finished=self.samples >= self._end,
        )
        snapshot = Snapshot(
            state, weights(self.engine), self._averaged_weights(), optimizer_state(self.engine)
        )
        keep = self.config.every.keep_checkpoints

        def write(_local: ray.train.Checkpoint, _name: str) -> ray.train.Checkpoint:
            written = snapshot.write(self._folder)
            prune(self._folder, keep)
            storage = ray.train.get_context().get_storage()
            path = f"{storage.experiment_fs_path}/checkpoints/{written.name}"
            return ray.train.Checkpoint(path, filesystem=storage.storage_filesystem)

        # Ray takes a local folder to copy; ours is written in place by `write`, from memory.
        placeholder = ray.train.Checkpoint(tempfile.gettempdir()) if self.rank == 0 else None
        ray.train.report(
            {"samples": self.samples, **({"psnr": score} if score is not None else {})},
            checkpoint=placeholder,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=write,
            delete_local_checkpoint_after_upload=False,
        )
