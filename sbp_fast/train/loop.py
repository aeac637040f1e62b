"""The training loop, shared by all arms and the synthesizer, which differ only in their batches."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sbp_fast.config import RunConfig, TrainConfig
from sbp_fast.errors import UserError
from sbp_fast.model.flops import training_flops
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.distributed import Processes
from sbp_fast.pipeline.files import write_json
from sbp_fast.pipeline.interrupts import Stopped, StopRequest
from sbp_fast.pipeline.progress import Console
from sbp_fast.train.checkpoint import CHECKPOINTS, Checkpoints
from sbp_fast.train.data.batches import COUNTED, REAL, SYNTHETIC, Batches, Counts, PackedBatch
from sbp_fast.train.data.prefetch import Prefetch
from sbp_fast.train.log import Log
from sbp_fast.train.metrics import RECENT, Clock, DeviceFigures, Totals, mean_figures, speed
from sbp_fast.train.optimizer import Optimizers, make_optimizers
from sbp_fast.train.profile import Profile
from sbp_fast.train.schedules import learning_rate
from sbp_fast.train.sharding import accumulate
from sbp_fast.train.update import update
from sbp_fast.train.validation import Validation, best_point, points_since_best

BAD_STEPS = "bad-steps.json"


def train_step(
    model: Transformer,
    sequences: Iterator[PackedBatch],
    count: int,
    optimizers: Optimizers,
    recipe: TrainConfig,
    rate: float,
    *,
    gather_once: bool = False,
) -> tuple[Tensor, Tensor, Counts]:
    """Take one step on the mean loss over all tokens with loss, of the packed sequences of all processes.

    No host-device synchronisation with AdamW. Where loss or gradient norm is not finite, weights and optimizer state stay
    as they are.

    Args:
        model: the model, sharded or not.
        sequences: packed sequences of this process, `count` of them.
        count: number of packed sequences that this process reads in the step.
        optimizers: the model's optimizers.
        recipe: attention backend and gradient clipping.
        rate: learning rate.
        gather_once: keep sharded weights gathered over the sequences of the step.

    Returns:
        The mean loss in nats, the gradient norm before clipping (both scalars on the device), and the counts of what this
        process read.
    """
    counts = Counts()
    loss = torch.zeros((), dtype=torch.float32, device=model.device)
    for sequence in accumulate(model, sequences, count, gather_once):
        sequence_loss = model(sequence.tokens, sequence.layout, sequence.targets, sequence.loss_rows, recipe.attention)
        sequence_loss.backward()
        loss += sequence_loss.detach()
        counts.add(sequence.counts)
    sums = torch.stack([loss, loss.new_tensor(float(counts.loss_tokens))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, loss_tokens = sums
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = update(optimizers, gradients, recipe, rate, loss_tokens)
    return loss / loss_tokens, norm, counts


class Training:
    """A training run, from its newest checkpoint or from its beginning to its end.

    Args:
        model: a model built by `sharding.build`, with the weights to start from.
        batches: packed sequences of every step.
        recipe: what to compute.
        config: how to compute, save and log it.
        directory: directory for checkpoints, metrics.jsonl and bad-steps.json; all processes see the same one.
        out: final path of the run's output: trackers and profiles go to paths beside it, and its name is the run's.
        console: where progress is printed.
        real_epoch_tokens: number of tokens in one epoch of the real corpus, for the metrics.
        validation: what is measured at evenly spaced points of the run.
        on_save: called on rank 0 after each checkpoint is begun.
        profile_steps: a range of steps to profile, such as "10:13" (see `Profile`).
    """

    def __init__(
        self,
        model: Transformer,
        batches: Batches,
        recipe: TrainConfig,
        config: RunConfig,
        processes: Processes,
        *,
        directory: Path,
        out: Path,
        console: Console,
        real_epoch_tokens: int,
        validation: Validation,
        on_save: Callable[[], None] = lambda: None,
        profile_steps: str | None = None,
    ) -> None:
        self.model, self.batches, self.recipe, self.config, self.processes = model, batches, recipe, config, processes
        self.directory, self.out, self.console = directory, out, console
        self.real_epoch_tokens, self.validation, self.on_save = real_epoch_tokens, validation, on_save
        self.optimizers = make_optimizers(model, recipe)
        self.checkpoints = Checkpoints(directory / CHECKPOINTS, config.checkpoint, processes, console)
        self.profile = Profile(profile_steps, out.with_name(out.name + ".profile"), processes.device)
        self.totals, self.unread, self.figures, self.clock = Totals(), Counts(), DeviceFigures(), Clock()
        self.log_sizes: dict[str, int] = {}

    def run(self) -> Totals:
        """Train on all steps that are left, or until `patience` ends the run, and leave the selected weights in the model.

        The checkpoints stay until `checkpoints.clear`, which belongs after the model is saved.

        Raises:
            Stopped: SIGTERM or SIGINT came; a checkpoint is saved.
            UserError: too many consecutive steps were not finite; the checkpoint of the selected weights is damaged.
        """
        with self.checkpoints:
            self.resume()
            self.model.train()
            self.take_steps()
            if self.selected_step != self.totals.steps:
                self.checkpoints.load(self.checkpoints.find(self.selected_step), self.model, self.optimizers)
        return self.totals

    @property
    def selected_step(self) -> int:
        """Number of steps after which the weights are the output: the last so far, or those of the best validation point."""
        best = best_point(self.totals.validations)
        return self.totals.steps if self.recipe.select == "last" or best is None else best[0]

    def prefetch(self, first_step: int) -> Prefetch:
        """Return this process's packed sequences from a step on."""
        rank, world, width = self.processes.rank, self.processes.world, self.config.model.head_dim
        return Prefetch(self.batches, first_step, device=self.processes.device, rank=rank, world=world, head_width=width)

    def take_steps(self) -> None:
        """Take all steps that are left, and write metrics and checkpoints between them."""
        first, earlier_seconds, started = self.totals.steps, self.totals.loop_seconds, time.monotonic()
        with (
            StopRequest() as stop,
            self.prefetch(first) as prefetch,
            self.open_log() as log,
            frozen_garbage() as freeze,
        ):
            self.clock, self.saved = Clock(), time.monotonic()
            points = self.validation.steps(self.batches.steps)
            for step in range(first, self.batches.steps):
                self.profile.begin(step)
                self.step(step, prefetch)
                self.profile.end(step)
                is_point, last = step + 1 in points, step + 1 == self.batches.steps
                if is_point or last or (step + 1) % self.config.log.every_steps == 0:
                    self.read()
                if last or (step + 1) % self.config.log.every_steps == 0:
                    log.write(self.line(step))
                    self.go_back_from_a_spike(log)
                if is_point:
                    self.validate(step, log)
                    if not last and self.is_out_of_patience():
                        last = True
                        if self.totals.pending:
                            log.write(self.line(step))
                if step == first:
                    freeze()
                self.totals.loop_seconds = earlier_seconds + time.monotonic() - started
                if last:
                    return
                if self.is_time_to_save(step, stop):
                    self.save(log)
                    if stop.agreed_signal:
                        self.checkpoints.wait()
                        raise Stopped(stop.agreed_signal, self.totals.steps)

    def resume(self) -> None:
        """Load the newest sound checkpoint, if there is one."""
        newest = self.checkpoints.newest()
        if newest is not None:
            path, marker = newest
            self.checkpoints.load(path, self.model, self.optimizers)
            self.totals = Totals.of(marker["totals"])
            self.log_sizes = {name: begin["bytes"] for name, begin in marker["logs"].items()}
            self.console.say(f"going on from {path.name}")

    def open_log(self) -> Log:
        """Return the log of the steps that are left."""
        return Log(
            self.directory,
            self.out,
            self.config,
            self.console,
            sizes=self.log_sizes,
            steps=self.totals.steps,
            tokens=self.totals.tokens,
            total_tokens=self.batches.steps * self.batches.sequences_per_step * self.batches.sequence_tokens,
            writes=self.processes.is_rank0,
        )

    def step(self, step: int, prefetch: Prefetch) -> None:
        """Train on the batch of `step`."""
        loss, norm, counts = train_step(
            self.model,
            prefetch.step(),
            len(prefetch.indices),
            self.optimizers,
            self.recipe,
            learning_rate(self.recipe, step, self.batches.steps),
            gather_once=self.config.parallel.gather_once,
        )
        self.figures.add(loss, norm)
        self.unread.add(counts)
        self.clock.steps += 1
        self.clock.waited, prefetch.waited = self.clock.waited + prefetch.waited, 0.0

    def read(self) -> None:
        """Bring the totals up to the last step.

        This synchronises with the device.

        Raises:
            UserError: too many consecutive steps were not finite.
        """
        for loss, norm in self.figures.read():
            self.totals.step(loss, norm)
        counts = Counts(*map(int, self.processes.sum(*(getattr(self.unread, name) for name in COUNTED))))
        self.totals.add(counts)
        self.totals.since.add(counts)
        self.unread = Counts()
        if self.totals.skipped_in_a_row >= self.recipe.bad_steps:
            self.give_up()

    def line(self, step: int) -> dict[str, Any]:
        """Return the metrics of the steps since the last line, up to `step`, and begin a new line."""
        totals, since = self.totals, self.totals.since
        loss, norm = mean_figures(totals.pending)
        size = self.model.vocabulary_size
        devices, device = self.processes.world, self.processes.device
        line = {
            "step": step,
            "train/tokens": totals.tokens,
            "train/flops": training_flops(self.model.config, size, totals.tokens, totals.visible_pairs, totals.loss_tokens),
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr": learning_rate(self.recipe, step, self.batches.steps),
            "train/skipped_steps": totals.skipped_steps,
            "data/valid_share": (since.real_tokens + since.synthetic_tokens) / since.tokens,
            "data/loss_share": since.loss_tokens / since.tokens,
            "data/real_share": since.real_tokens / since.tokens,
            "data/synthetic_share": since.synthetic_tokens / since.tokens,
            "data/digest": since.digest,
            "data/real_epochs": totals.real_tokens / self.real_epoch_tokens,
            **speed(self.clock, since, self.model.config, size, devices, device),
        }
        totals.pending, totals.since, self.clock = [], Counts(), Clock()
        return line

    def validate(self, step: int, log: Log) -> None:
        """Measure the held-out loss after `step` and write a few samples; the time is not counted as that of steps."""
        started = time.monotonic()
        if self.validation.measured is not None:
            loss = self.validation.loss(self.model, self.processes, self.recipe.attention)
            self.totals.validations.append((self.totals.steps, loss))
            log.write_validation({"step": step, "train/tokens": self.totals.tokens, **self.validation.metrics(loss)})
        log.write_samples(step, self.validation.samples(self.model, self.processes))
        seconds = time.monotonic() - started
        self.totals.validation_seconds += seconds
        self.clock.started += seconds

    def is_out_of_patience(self) -> bool:
        """Return whether the held-out loss has not improved for `patience` points, and say so."""
        points = points_since_best(self.totals.validations)
        if not self.recipe.patience or points < self.recipe.patience:
            return False
        self.console.say(f"stopped after {self.totals.steps} steps: no lower held-out loss in {points} points")
        return True

    def is_time_to_save(self, step: int, stop: StopRequest) -> bool:
        """Return whether all processes save now.

        A checkpoint is due, one of them received a signal to stop, or the weights are the best so far and may be selected.
        """
        every = self.config.checkpoint.keep_every_steps
        late = self.processes.is_rank0 and time.monotonic() - self.saved >= self.config.checkpoint.seconds
        stop.agreed_signal, due = map(int, self.processes.max(stop.signal_number, late))
        best = best_point(self.totals.validations) if self.recipe.select == "best" else None
        return bool(stop.agreed_signal or due or (every and (step + 1) % every == 0) or (best and best[0] == step + 1))

    def save(self, log: Log) -> None:
        """Begin a checkpoint of all steps so far, which counts on the lines of the log; it is written in the background."""
        self.read()
        selected, totals = self.selected_step, asdict(self.totals)
        state = self.totals.steps, self.model, self.optimizers
        self.clock.stalled += self.checkpoints.save(*state, totals, selected, log.sync())
        if self.processes.is_rank0:
            self.on_save()
        self.saved = time.monotonic()

    def go_back_from_a_spike(self, log: Log) -> None:
        """Where the last loss is a spike, load the last checkpoint and go on with the next batch."""
        if not is_spike(self.totals.recent, self.recipe.spike_deviations):
            return
        self.checkpoints.wait()
        newest = self.checkpoints.newest()
        if newest is None:
            self.console.say(f"loss spike at step {self.totals.steps - 1}, and no checkpoint yet to go back to")
            return
        path, marker = newest
        self.checkpoints.load(path, self.model, self.optimizers)
        self.totals.recent.pop()
        self.totals.rolled_back_steps += self.totals.steps - marker["step"]
        self.console.say(f"loss spike at step {self.totals.steps - 1}: weights of {path.name}, the batches since left out")
        if self.totals.steps < self.batches.steps:
            self.save(log)  # or a resumed run would learn from those batches after all

    def give_up(self) -> None:
        """Write the documents of the bad steps to bad-steps.json, and end the run.

        Raises:
            UserError: always.
        """
        count, last = self.totals.skipped_in_a_row, self.totals.steps - 1
        bad_steps = self.directory / BAD_STEPS
        if self.processes.is_rank0:
            write_json(bad_steps, [self.documents(step) for step in range(last + 1 - count, last + 1)])
        raise UserError(
            f"training, step {last}",
            f"loss or gradient not finite {count} steps in a row; the documents of these steps are listed in {bad_steps}",
            "lower learning_rate or gradient_clip of the recipe, or lengthen its warmup_fraction",
        )

    def documents(self, step: int) -> dict[str, Any]:
        """Return the source and the document numbers of every packed sequence of a step, over all processes."""
        sequences = [self.batches.sequence(step, index) for index in range(self.batches.sequences_per_step)]
        sources = [SYNTHETIC if sequence.counts.synthetic_tokens else REAL for sequence in sequences]
        listed = [
            {"source": source, "documents": list(sequence.documents)}
            for source, sequence in zip(sources, sequences, strict=True)
        ]
        return {"step": step, "sequences": listed}


@contextmanager
def frozen_garbage() -> Iterator[Callable[[], None]]:
    """Yield a function that exempts all objects alive when it is called from garbage collection, until the context ends.

    Called once the long-lived objects of a run exist, it saves the collector from walking them again and again.
    """

    def freeze() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield freeze
    finally:
        gc.unfreeze()


def is_spike(recent: Sequence[float], deviations: float) -> bool:
    """Return whether the last of the recent losses exceeds the mean of those before it by so many standard deviations."""
    if not deviations or len(recent) < RECENT:
        return False
    before = recent[:-1]
    return recent[-1] > statistics.fmean(before) + deviations * statistics.pstdev(before)
