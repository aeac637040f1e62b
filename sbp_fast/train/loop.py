"""The one training loop: base, synthesizer and joint runs differ in their batches alone."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sbp_fast.config import RunConfig, TrainConfig
from sbp_fast.errors import UserError
from sbp_fast.model.flops import training_flops
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.distributed import Processes, Stopped, StopRequest
from sbp_fast.pipeline.files import write_json
from sbp_fast.pipeline.stage import Work
from sbp_fast.train.checkpoint import CHECKPOINTS, Checkpoints
from sbp_fast.train.data.batches import COUNTED, REAL, SYNTHETIC, Batches, Counts, PackedBatch
from sbp_fast.train.data.prefetch import Prefetch
from sbp_fast.train.log import Log
from sbp_fast.train.metrics import RECENT, Clock, DeviceFigures, Totals, mean_figures, speed
from sbp_fast.train.optimizer import Optimizers, learning_rate, make_optimizers, update
from sbp_fast.train.profile import Profile
from sbp_fast.train.sharding import accumulate

BAD_STEPS = "bad-steps.json"


def train_step(
    model: Transformer,
    streams: Iterator[PackedBatch],
    count: int,
    optimizers: Optimizers,
    recipe: TrainConfig,
    rate: float,
    *,
    gather_once: bool = False,
) -> tuple[Tensor, Tensor, Counts]:
    """One step on the mean loss over all tokens with loss of all processes' streams; nothing in it waits for the device.

    Args:
        streams: of this process, `count` of them.
        rate: learning rate.

    Returns:
        The mean loss in nats and the gradient norm before clipping, scalars on the device, and what this process read. Where
        one is not finite, weights and optimizers are as they were.
    """
    counts = Counts()
    loss = torch.zeros((), dtype=torch.float32, device=model.device)
    for stream in accumulate(model, streams, count, gather_once):
        part = model(stream.tokens, stream.layout, stream.targets, stream.loss_rows, recipe.attention)
        part.backward()
        loss += part.detach()
        counts.add(stream.counts)
    sums = torch.stack([loss, loss.new_tensor(float(counts.loss_tokens))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, loss_tokens = sums
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = update(optimizers, gradients, recipe, rate, loss_tokens)
    return loss / loss_tokens, norm, counts


class Training:
    """A run from its newest checkpoint, or from its beginning, to its end.

    Args:
        model: as `sharding.build` made it, with the weights to start from.
        recipe: what to compute; `config` says how.
        real_epoch: tokens of one reading of the real corpus, for the metrics.
        profile_steps: as `Profile` takes them.
    """

    def __init__(
        self,
        model: Transformer,
        batches: Batches,
        recipe: TrainConfig,
        config: RunConfig,
        work: Work,
        processes: Processes,
        *,
        real_epoch: int,
        profile_steps: str | None = None,
    ) -> None:
        self.model, self.batches, self.recipe, self.config = model, batches, recipe, config
        self.work, self.processes, self.real_epoch = work, processes, real_epoch
        self.optimizers = make_optimizers(model, recipe)
        self.checkpoints = Checkpoints(work.directory / CHECKPOINTS, config.checkpoint, processes, work.console)
        self.profile = Profile(profile_steps, work.beside(".profile"), processes.device)
        self.totals, self.unread, self.figures, self.clock = Totals(), Counts(), DeviceFigures(), Clock()

    def run(self) -> Totals:
        """Train on all steps; the checkpoints stay until `checkpoints.clear`, which is for when the model is saved.

        Raises:
            Stopped: SIGTERM or SIGINT came; what was done is saved.
            UserError: too many steps in a row were not finite.
        """
        with self.checkpoints:
            self.resume()
            self.model.train()
            self.take_steps()
        return self.totals

    def take_steps(self) -> None:
        """All steps that are left, with what stands between them."""
        first, earlier, begun = self.totals.steps, self.totals.loop_seconds, time.monotonic()
        with (
            StopRequest() as stop,
            Prefetch(self.batches, first, self.processes) as prefetch,
            Log(self.work, self.config, self.processes, self.totals, self.batches) as log,
            frozen_garbage() as freeze,
        ):
            self.clock, self.saved = Clock(), time.monotonic()
            for step in range(first, self.batches.steps):
                self.profile.begin(step)
                self.step(step, prefetch)
                self.profile.end(step)
                last = step + 1 == self.batches.steps
                if last or (step + 1) % self.config.log.every_steps == 0:
                    self.read()
                    log.write(self.line(step))
                    self.go_back_from_a_spike()
                if step == first:
                    freeze()
                self.totals.loop_seconds = earlier + time.monotonic() - begun
                if not last and self.is_time_to_save(step, stop):
                    log.sync()
                    self.save()
                    if stop.agreed_signal:
                        self.checkpoints.wait()
                        raise Stopped(stop.agreed_signal, self.totals.steps)

    def resume(self) -> None:
        """Go to the newest sound checkpoint, if there is one."""
        found = self.checkpoints.newest()
        if found is not None:
            path, marker = found
            self.checkpoints.load(path, self.model, self.optimizers)
            self.totals = Totals.of(marker["totals"])
            self.work.console.say(f"going on from {path.name}")

    def step(self, step: int, prefetch: Prefetch) -> None:
        """Train on the batch of `step`."""
        loss, norm, counts = train_step(
            self.model,
            prefetch.step(),
            len(prefetch.numbers),
            self.optimizers,
            self.recipe,
            learning_rate(self.recipe, step, self.batches.steps),
            gather_once=self.config.parallel.gather_once,
        )
        self.figures.keep(loss, norm)
        self.unread.add(counts)
        self.clock.steps += 1
        self.clock.waited, prefetch.waited = self.clock.waited + prefetch.waited, 0.0

    def read(self) -> None:
        """Bring the totals up to the last step: the one place that waits for the device."""
        for loss, norm in self.figures.read():
            self.totals.step(loss, norm)
        read = Counts(*map(int, self.processes.sum(*(getattr(self.unread, name) for name in COUNTED))))
        self.totals.add(read)
        self.totals.since.add(read)
        self.unread = Counts()
        if self.totals.skipped_in_a_row >= self.recipe.bad_steps:
            self.give_up()

    def line(self, step: int) -> dict[str, Any]:
        """What the metrics say of the steps since the last line, up to `step`."""
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
            "data/real_epochs": totals.real_tokens / self.real_epoch,
            **speed(self.clock, since, self.model.config, size, devices, device),
        }
        totals.pending, totals.since, self.clock = [], Counts(), Clock()
        return line

    def is_time_to_save(self, step: int, stop: StopRequest) -> bool:
        """Whether all processes save now, because it is due or one was asked to stop."""
        every = self.config.checkpoint.keep_every_steps
        late = self.processes.is_rank0 and time.monotonic() - self.saved >= self.config.checkpoint.seconds
        stop.agreed_signal, due = map(int, self.processes.max(stop.signal_number, late))
        return bool(stop.agreed_signal or due or (every and (step + 1) % every == 0))

    def save(self) -> None:
        self.read()
        self.clock.stalled += self.checkpoints.save(self.totals.steps, self.model, self.optimizers, asdict(self.totals))
        if self.processes.is_rank0:
            self.work.keep_clock()
        self.saved = time.monotonic()

    def go_back_from_a_spike(self) -> None:
        """Where the last loss is a spike, take the weights of the last checkpoint, and go on with the next batch."""
        if not is_spike(self.totals.recent, self.recipe.spike_deviations):
            return None
        self.checkpoints.wait()
        found = self.checkpoints.newest()
        if found is None:
            return self.work.console.say(f"loss spike at step {self.totals.steps - 1}, and no checkpoint yet to go back to")
        path, marker = found
        self.checkpoints.load(path, self.model, self.optimizers)
        self.totals.recent.pop()
        self.totals.rolled_back_steps += self.totals.steps - marker["step"]
        self.work.console.say(f"loss spike at step {self.totals.steps - 1}: weights of {path.name}, the batches since left out")
        if self.totals.steps < self.batches.steps:
            self.save()  # or a resumed run would learn from those batches after all
        return None

    def give_up(self) -> None:
        """Write down what the bad steps read, and end the run."""
        number, last = self.totals.skipped_in_a_row, self.totals.steps - 1
        bad = self.work.directory / BAD_STEPS
        if self.processes.is_rank0:
            write_json(bad, [self.documents(step) for step in range(last + 1 - number, last + 1)])
        raise UserError(
            f"training, step {last}",
            f"loss or gradient not finite {number} steps in a row; what they read stands in {bad}",
            "lower learning_rate or gradient_clip of the recipe, or lengthen its warmup_fraction",
        )

    def documents(self, step: int) -> dict[str, Any]:
        """The documents that all processes read in a step."""
        streams = [self.batches.stream(step, number) for number in range(self.batches.streams_per_step)]
        kinds = [SYNTHETIC if stream.counts.synthetic_tokens else REAL for stream in streams]
        parts = zip(kinds, streams, strict=True)
        return {"step": step, "streams": [{"source": kind, "documents": list(stream.documents)} for kind, stream in parts]}


@contextmanager
def frozen_garbage() -> Iterator[Callable[[], None]]:
    """A function to call once what a run needs stands: the garbage collector then need not walk it again and again."""

    def freeze() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield freeze
    finally:
        gc.unfreeze()


def is_spike(recent: Sequence[float], deviations: float) -> bool:
    """Whether the last of the recent losses exceeds the mean of those before it by so many standard deviations."""
    if not deviations or len(recent) < RECENT:
        return False
    before = recent[:-1]
    return recent[-1] > statistics.fmean(before) + deviations * statistics.pstdev(before)
