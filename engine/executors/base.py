"""The contract between the two threads and whatever runs the stages."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from ...core.step import StepPlan, StepResult
from ...workers.model_engine import ModelInfo


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """What start-up found out."""

    model: ModelInfo
    num_kv_blocks: int
    """Blocks in the pool, the null block included: the least over the stages."""
    block_size: int
    num_stages: int
    feeds_back: bool = False
    """Whether the stages go on from tokens they sampled themselves, so that plans may be pushed ahead of them
    (``StepPlan.feeds_from``). Where not, none is."""
    layers_per_stage: tuple[int, ...] = ()
    """Empty where nobody says."""


@dataclass(frozen=True, slots=True)
class Wake:
    """``wake()`` was called, once or more often."""


@dataclass(frozen=True, slots=True)
class StageDied:
    """A stage is gone; nothing more will come from it."""

    stage: int
    cause: str


@dataclass(frozen=True, slots=True)
class StagesUp:
    """``restart`` is through: the stages take plans of this epoch, with empty books and an empty cache."""

    epoch: int


Collected = StepResult | Wake | StageDied | StagesUp | None
"""What ``collect`` hands over; ``None`` when the time ran out."""


class Executor(abc.ABC):
    """Runs plans on the stages, in the order they were pushed.

    ``start`` and ``collect`` belong to the output thread, ``push`` to the scheduling thread, ``wake`` to anybody.
    Results come in the order of the pushes: a stage works first in, first out, and a step that fails still answers,
    with ``StepResult.error``. Slot and block changes of a plan are applied when it executes, not when it is pushed.
    """

    step_patience: float = 30.0
    """Seconds that one step may take on one stage before the stage counts as stuck, where that can be told. Set by the
    output thread, as it learns what steps take."""

    @abc.abstractmethod
    def start(self) -> ExecutorInfo:
        """Start the stages and load the model; blocks. Raises what a stage raised, after stopping the others."""

    @abc.abstractmethod
    def push(self, plan: StepPlan) -> None:
        """Hand a plan to the first stage. Never blocks on the stages; never raises for a stage's death."""

    @abc.abstractmethod
    def collect(self, timeout: float | None) -> Collected:
        """Wait for the next result, wake-up or death; ``None`` after ``timeout`` seconds without any."""

    @abc.abstractmethod
    def wake(self) -> None:
        """Make the current or next ``collect`` return a ``Wake``. Calls before it is seen count as one."""

    @property
    def can_restart(self) -> bool:
        """Whether ``restart`` may be called after a ``StageDied``."""
        return False

    def restart(self, epoch: int) -> None:
        """Begin to start all stages anew, for plans of ``epoch``. Output thread; does not wait. Called after a
        ``StageDied``, and where the books refuse an answer (``UnexpectedResult``): then it ends those that still live.

        ``collect`` goes on to report wake-ups meanwhile, and ``StagesUp`` or another ``StageDied`` at the end. Plans of
        an earlier epoch, also those pushed later, are dropped, and no result of them is reported.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def shutdown(self) -> None:
        """Stop the stages and free what they hold; ends within seconds. Callable twice, before ``start``, and from
        another thread while that runs, which then raises."""

    @property
    @abc.abstractmethod
    def num_stages(self) -> int:
        """How many stages a plan passes."""
