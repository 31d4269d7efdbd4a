"""How inference reads a long text with memory layers: when tokens leave the local window, and how many are remembered.

Source: the inference of LongLLaMA's released code for `last_context`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megayoco.config import ModelConfig
from megayoco.errors import UserError
from megayoco.ops.windows import Eviction, PromptWindows


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """What a user chooses; all None: windows as in training, and everything is remembered."""

    evicted: int | None = None
    """Tokens that leave a full window at a time, 1 to `model.memory_window`; None: all, as in training."""
    last_context: int | None = None
    """Tokens at the end of a prompt that are a window of their own, as in the released code, 1 to the window; the text
    before is cut into windows, and a window that overflows later is emptied. None: windows go on regardless."""
    capacity: int | None = None
    """Tokens in front of the window that a memory layer remembers, the latest; None: all."""

    def __post_init__(self) -> None:
        """Raises UserError, in the words of the command line, for what cannot be with any model."""
        for flag, value in self.given().items():
            if value < 1:
                raise UserError(f"{flag} must be at least 1, got {value}.")
        if self.evicted is not None and self.last_context is not None:
            raise UserError(
                "--memory-eviction and --last-context are two ways to cut a text into windows. Give one of them."
            )

    def given(self) -> dict[str, int]:
        """What was chosen, by the flags of the command line."""
        flags = {
            "--memory-eviction": self.evicted,
            "--last-context": self.last_context,
            "--memory-capacity": self.capacity,
        }
        return {flag: value for flag, value in flags.items() if value is not None}

    def checked(self, model: ModelConfig) -> WindowOptions:
        """Itself. Raises UserError, in the words of the command line, for what does nothing here or does not fit."""
        given = self.given()
        if given and model.memory_window is None:
            raise UserError(f"{next(iter(given))}: the model has no memory layers. Leave it out.")
        for flag in ("--memory-eviction", "--last-context"):
            if model.memory_window is not None and given.get(flag, 0) > model.memory_window:
                raise UserError(
                    f"{flag} {given[flag]} exceeds the model's window of {model.memory_window} tokens. Give at most so"
                    " many."
                )
        return self

    def resolved(self, model: ModelConfig) -> WindowOptions:
        """With the eviction that generation takes where nothing is told; raises UserError as `checked` does."""
        self.checked(model)
        if model.memory_window is None or self.evicted is not None or self.last_context is not None:
            return self
        return replace(self, evicted=default_eviction(model.memory_window))

    def eviction(self, model: ModelConfig) -> Eviction | None:
        """The rule of the windows; None: there are no memory layers, or it depends on prompts."""
        window = model.memory_window
        if window is None or self.last_context is not None:
            return None
        return Eviction(window=window, evicted=self.evicted or window, capacity=self.capacity)

    def prompts(self, model: ModelConfig) -> PromptWindows | None:
        """The windows before the first prompt; None: they do not depend on prompts."""
        if model.memory_window is None or self.last_context is None:
            return None
        return PromptWindows(model.memory_window, self.last_context, capacity=self.capacity)

    def room(self, model: ModelConfig, tokens: int) -> int:
        """Tokens to make room for in a memory that `tokens` are announced to."""
        if self.capacity is None or model.memory_window is None:
            return tokens
        return min(tokens, 2 * (self.capacity + model.memory_window))


def default_eviction(window: int) -> int:
    """Tokens that leave a full window at a time in generation: the measured best (docs/design.md)."""
    return max(window // 2, 1)
