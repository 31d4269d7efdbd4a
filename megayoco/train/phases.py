"""What comes next: from the number of finished steps to the phase, the place in it and the learning rate.

All of it is a pure function of the config and the step, so a resumed run continues exactly, and nothing but the step
has to be remembered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megayoco.config import ModelConfig, PhaseConfig, RunConfig


@dataclass(frozen=True)
class Position:
    """A place in the list of phases, before a step is made."""

    step: int
    """Optimizer steps finished since the start of the run."""
    phase: int
    """Number of the phase that the next step belongs to; the last one where the run is over."""
    phase_step: int
    """Steps of that phase already finished."""
    consumed_samples: int
    """Samples of that phase's data already used, by it and by earlier phases that read the same samples."""
    tokens: int
    """Tokens seen since the start of the run."""


class Timeline:
    """The phases of a run laid end to end.

    Args:
        phases: in order.
        data: what each phase reads; phases with equal data and sequence length read on in one order of samples.
            Default: all read the same.
    """

    def __init__(self, phases: Sequence[PhaseConfig], data: Sequence[Any] | None = None) -> None:
        self.phases = list(phases)
        sources = [(phase.sequence_length, None if data is None else data[i]) for i, phase in enumerate(phases)]
        self._first_samples = [
            sum(phase.num_steps * phase.batch_size for j, phase in enumerate(phases[:i]) if sources[j] == sources[i])
            for i in range(len(phases))
        ]
        self.total_steps = sum(phase.num_steps for phase in phases)
        self.total_tokens = sum(phase.num_steps * phase.tokens_per_step for phase in phases)

    @classmethod
    def of(cls, run: RunConfig) -> Timeline:
        """The phases of a run with the data of each."""
        return cls(
            run.phases, [run.phase_data(i).order_settings(phase.batch_size) for i, phase in enumerate(run.phases)]
        )

    def position(self, step: int) -> Position:
        """Where the run stands after `step` steps. Raises ValueError outside 0..total_steps."""
        if not 0 <= step <= self.total_steps:
            raise ValueError(f"step {step} lies outside the run of {self.total_steps} steps")
        left, tokens, number = step, 0, 0
        for number, phase in enumerate(self.phases):
            if left < phase.num_steps:
                break
            if number == len(self.phases) - 1:
                break
            left -= phase.num_steps
            tokens += phase.num_steps * phase.tokens_per_step
        phase = self.phases[number]
        samples = self._first_samples[number] + left * phase.batch_size
        return Position(step, number, left, samples, tokens + left * phase.tokens_per_step)

    def samples_until_end(self, number: int) -> int:
        """Samples of a phase's data that are used when the phase is over."""
        return self._first_samples[number] + self.phases[number].num_steps * self.phases[number].batch_size

    def is_end_of_phase(self, step: int) -> bool:
        """Whether `step` finished steps complete a phase."""
        ends, end = set(), 0
        for phase in self.phases:
            end += phase.num_steps
            ends.add(end)
        return step in ends


def trained_model(run: RunConfig, step: int) -> ModelConfig:
    """The model with the rotary base of the phase that `step` finished steps have reached."""
    return dataclasses.replace(run.model, rope_theta=run.phase_rope_theta(_reached(run, step)))


def training_facts(run: RunConfig, step: int) -> dict[str, Any]:
    """What is worth knowing of the weights after `step` steps, JSON-able: step, tokens, seed, and the phases so far
    with their `sequence_length`, `rope_theta` and `tokens` seen; the `sequence_length` beside them is the longest."""
    seen, left = [], step
    for number, phase in enumerate(run.phases[: _reached(run, step) + 1]):
        steps = min(left, phase.num_steps)
        left -= steps
        theta, tokens = run.phase_rope_theta(number), steps * phase.tokens_per_step
        seen.append({"sequence_length": phase.sequence_length, "rope_theta": theta, "tokens": tokens})
    longest = max(phase["sequence_length"] for phase in seen)
    tokens = Timeline.of(run).position(step).tokens
    return {"step": step, "tokens": tokens, "seed": run.seed, "sequence_length": longest, "phases": seen}


def _reached(run: RunConfig, step: int) -> int:
    """Number of the phase that the last of `step` steps belonged to."""
    position = Timeline.of(run).position(step)
    return position.phase - (position.phase_step == 0 and position.phase > 0)


def phase_label(phases: Sequence[PhaseConfig], number: int) -> str:
    """What a phase is called in logs: its name, or its number."""
    return phases[number].name or str(number)


def phase_notes(run: RunConfig) -> list[str]:
    """What is allowed but unusual about the lengths, rotary bases and memory of a run, one line each."""
    notes, longest = [], 0
    for number, phase in enumerate(run.phases):
        label, length, theta = phase_label(run.phases, number), phase.sequence_length, run.phase_rope_theta(number)
        if length < longest:
            notes.append(f"phase {label}: {length:,} tokens, after a phase of {longest:,}; the context shrinks")
        if number == 0 and phase.optimizer_state == "reset":
            notes.append(f"phase {label}: optimizer_state reset means nothing in the first phase")
        if number:
            before, base = run.phases[number - 1].sequence_length, run.phase_rope_theta(number - 1)
            if theta != base and length == before:
                notes.append(f"phase {label}: rope_theta changes from {base:g} to {theta:g} at the same length")
            if theta < base and length > before:
                notes.append(f"phase {label}: rope_theta falls from {base:g} to {theta:g} while the context grows")
        if run.model.window is not None and run.model.window >= length:
            notes.append(f"phase {label}: the window of {run.model.window:,} tokens covers sequences of {length:,}")
        if run.model.memory_window is not None and run.model.memory_window >= length and phase.cross_batch is None:
            notes.append(
                f"phase {label}: the memory window of {run.model.memory_window:,} tokens covers sequences of"
                f" {length:,}; memory layers remember nothing in training"
            )
        if (
            phase.cross_batch is not None
            and phase.cross_batch.negatives == "micro_batch"
            and phase.micro_batch_size == 1
        ):
            notes.append(
                f"phase {label}: cross_batch finds no other sample in a micro_batch_size of 1; there are no distractors"
            )
        longest = max(longest, length)
    return notes


def learning_rate(phase: PhaseConfig, phase_step: int) -> float:
    """Learning rate of the step that follows `phase_step` finished steps of the phase.

    The warm-up rises in equal parts from 0 and meets the peak on the first step after it; the fall starts at the peak
    and would meet the minimum on the step after the last one. No step has a learning rate of zero.
    """
    peak, low = phase.learning_rate, phase.min_learning_rate
    warmup, total = phase.num_warmup_steps, phase.num_steps
    if phase_step < warmup:
        return peak * (phase_step + 1) / (warmup + 1)
    start = total - phase.num_decay_steps if phase.schedule == "wsd" else warmup
    if phase.schedule == "constant" or phase_step < start:
        return peak
    progress = min(1.0, (phase_step - start) / (total - start))
    if phase.schedule == "cosine":
        return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2
    return low + (peak - low) * (1 - progress)
