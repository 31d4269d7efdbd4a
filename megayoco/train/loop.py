"""The loop over steps: ask the session what comes next, the engine for a step, and remember what happened."""

from __future__ import annotations

import math
import time
from typing import Any

from megayoco.parallel.agreement import AgreedError
from megayoco.train import checkpoint
from megayoco.train.engine import StepResult
from megayoco.train.evaluation import Evaluations, evaluation_line, for_tensorboard
from megayoco.train.exporting import export
from megayoco.train.metrics import IntervalClock, model_flops_per_step, peak_memory_bytes
from megayoco.train.phases import Position, learning_rate, phase_label
from megayoco.train.report import Reporter, step_line
from megayoco.train.session import Session


class Trainer:
    """Trains a session from where it stands to its end."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._run = session.run
        self._timeline = session.timeline
        self._clock = IntervalClock()
        self._evaluations = Evaluations(
            self._run, session.engine, session.tokenizer, session.directory, self._timeline.total_steps
        )
        self._report = Reporter(
            session.directory,
            self._timeline.total_steps,
            session.step,
            tensorboard=self._run.logging.tensorboard,
            bar=session.launch.inherits_terminal,
            enabled=session.launch.rank == 0,
        )

    def train(self) -> None:
        """Run all steps that are left, then save and export. Collective.

        Raises:
            AgreedError: the loss or the gradient is not finite.
        """
        session = self._session
        for line in session.banner():
            self._report.line(line)
        try:
            step = session.step
            if self._evaluations.due(step) and step and not self._evaluations.is_done(step):
                # the run was interrupted between the checkpoint and its evaluation
                phase = self._timeline.position(step - 1).phase
                session.engine.begin_phase(phase)
                self._evaluate(step, phase, resuming=True)
            if step == self._timeline.total_steps:
                self._report.line(f"The run is complete: all {step} steps are done. Make the phases longer to go on.")
            while step < self._timeline.total_steps:
                step = self._phase(step)
            self._finish(step)
        finally:
            self._report.close()

    def _phase(self, step: int) -> int:
        """Train to the end of the phase that follows `step` finished steps; returns the steps finished then."""
        session, engine = self._session, self._session.engine
        start = self._timeline.position(step)
        phase = self._run.phases[start.phase]
        bands = self._run.phase_bands(start.phase)
        batches = session.batches(start.phase, start.consumed_samples)
        engine.begin_phase(start.phase)
        if step and start.phase_step == 0 and phase.optimizer_state == "reset":
            engine.reset_optimizer()
            self._report.line(f"phase {phase_label(self._run.phases, start.phase)}: the optimizer starts afresh")
        self._report.line(
            f"phase {phase_label(self._run.phases, start.phase)}: "
            f"steps {step + 1} to {step + phase.num_steps - start.phase_step}, "
            f"{phase.batch_size} sequences of {phase.sequence_length} tokens"
            + (f" in {bands} bands ({self._run.parallel.band_order})" if bands != 1 else "")
        )
        flops = model_flops_per_step(self._run.model, phase.sequence_length, phase.batch_size)
        total_flops = IntervalClock()
        self._clock.reset()
        total_flops.reset()
        try:
            for phase_step in range(start.phase_step, phase.num_steps):
                rate = learning_rate(phase, phase_step)
                micro_batches = batches.next_step() if engine.reads_data else []
                before = time.perf_counter()
                result = engine.train_step(micro_batches, rate)
                seconds = time.perf_counter() - before
                step += 1
                for clock in (self._clock, total_flops):
                    clock.add_step(seconds, phase.tokens_per_step, flops)
                self._log(self._timeline.position(step), start.phase, result, rate, total_flops)
                self._after_step(step, start.phase)
                total_flops.reset()
        finally:
            batches.close()
        return step

    def _log(self, position: Position, phase: int, result: StepResult, rate: float, clock: IntervalClock) -> None:
        step, label = position.step, phase_label(self._run.phases, phase)
        if not math.isfinite(result.loss) or not (math.isfinite(result.grad_norm) or result.skipped):
            what = "loss" if not math.isfinite(result.loss) else "gradient norm"
            raise AgreedError(
                f"The {what} of step {step} (phase {label}) is {result.loss if what == 'loss' else result.grad_norm}. "
                f"The last checkpoint is from before it. Lower phases.{phase}.learning_rate, warm up for longer, or "
                "check the data of these steps; then go on with --resume."
            )
        self._report.advance(step)
        interval = self._run.logging.interval
        speaks = step % interval == 0 or step == self._timeline.total_steps or step == self._session.step + 1
        if not self._report.enabled:
            if speaks:
                self._clock.reset()
            return
        values: dict[str, Any] = {
            "step": step,
            "phase": label,
            "loss": result.loss,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "learning_rate": rate,
            "tokens": position.tokens,
            **clock.rates(self._session.peak),
            "peak_memory_bytes": peak_memory_bytes(self._session.device),
        }
        if result.bytes_sent:
            values["bytes_sent"] = result.bytes_sent
        if result.skipped:
            values["skipped"] = True
        self._report.record(values)
        if speaks:
            rates = self._clock.rates(self._session.peak)
            shown = {**values, **rates}
            self._report.line(step_line(shown, self._timeline.total_steps))
            names = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "peak_memory_bytes", "overhead")
            self._report.scalars(step, {f"train/{name}": shown[name] for name in names})
            self._report.scalars(step, {f"bytes_sent/{name}": count for name, count in result.bytes_sent.items()})
            self._clock.reset()

    def _after_step(self, step: int, phase: int) -> None:
        """Validation, checkpoint and evaluation where they are due."""
        before = time.perf_counter()
        validation, saving = self._run.validation.interval, self._run.checkpoint.interval
        if self._timeline.is_end_of_phase(step) or (validation and step % validation == 0):
            self._validate(step, phase)
        if saving and step % saving == 0 and step < self._timeline.total_steps:
            self._save(step, self._run.checkpoint.export == "every")
        if self._evaluations.due(step) and step < self._timeline.total_steps:
            self._evaluate(step, phase)
        self._clock.excluded_seconds += time.perf_counter() - before

    def _validate(self, step: int, phase: int) -> None:
        batches = self._session.validation_batches(phase)
        if batches is None or not len(batches):
            return
        loss = self._session.engine.evaluate(batches)
        label = phase_label(self._run.phases, phase)
        self._report.line(f"step {step}  phase {label}  validation loss {loss:.4f}")
        self._report.record({"step": step, "phase": label, "validation_loss": loss})
        self._report.scalars(step, {"validation/loss": loss})

    def _evaluate(self, step: int, phase: int, *, resuming: bool = False) -> None:
        label = phase_label(self._run.phases, phase)
        for name, scalars in self._evaluations.evaluate(step, phase, resuming=resuming):
            self._report.line(f"step {step}  phase {label}  {evaluation_line(name, scalars)}")
            self._report.record({"step": step, "phase": label, "evaluation": scalars})
            self._report.scalars(step, for_tensorboard(scalars))
        self._report.flush()

    def _save(self, step: int, exporting: bool) -> None:
        session = self._session
        self._report.flush()  # metrics on disk reach at least as far as the checkpoint
        identities = session.identities() if self._report.enabled else {}
        folder = checkpoint.save(session.engine, self._run, session.plan.checkpoints, step, identities)
        self._report.line(f"step {step}  saved {folder}")
        if self._report.enabled:
            for removed in checkpoint.prune(session.plan.checkpoints, step, self._run.checkpoint):
                self._report.line(f"step {step}  removed the checkpoint of step {removed}")
        if exporting:
            directory = session.directory / "export"
            export(session.engine, self._run, step, session.tokenizer, directory)
            self._report.line(f"step {step}  exported {directory}")

    def _finish(self, step: int) -> None:
        done = self._session.plan.checkpoint is not None and self._session.step == step
        exporting = self._run.checkpoint.export != "never"
        if not done or (exporting and not (self._session.directory / "export").exists()):
            self._save(step, exporting)
        if not done and self._evaluations.due(step):
            self._evaluate(step, len(self._run.phases) - 1)
