"""What a request needs besides KV blocks: sequence slots, and whatever a user's own manager hands out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from ..core.errors import ConfigError
from ..core.request import Request
from ..core.step import StepPlan
from ..core.views import RequestView


class BaseResourceManager(ABC):
    """Something countable that requests hold while they are resident. Every method runs under the state lock, so it
    must be quick and must not call the engine. What it raises fails the requests concerned, not the engine.

    A whole manager, for four places at some table::

        class Places(BaseResourceManager):
            name = "places"

            def __init__(self) -> None:
                self.held: set[int] = set()

            def needed(self, request: RequestView) -> int:
                return 0 if request.request_id in self.held else 1

            def available(self) -> int:
                return 4 - len(self.held)

            def prepare_resources(self, plan: StepPlan) -> None:
                self.held.update(start.request_id for start in plan.starts)

            def free_resources(self, request: Request) -> None:
                self.held.discard(request.request_id)
    """

    name: str
    """Unique within an engine; shown when a request waits for it."""

    @abstractmethod
    def needed(self, request: RequestView) -> int:
        """How many the request would take if it became resident now, beyond what it holds."""

    @abstractmethod
    def available(self) -> int:
        """How many nobody holds."""

    # Optional, so empty and not abstract.

    def prepare_resources(self, plan: StepPlan) -> None:  # noqa: B027
        """The plan was booked and is about to be pushed; ``plan.starts`` become resident with it."""

    def update_resources(self, plan: StepPlan) -> None:  # noqa: B027
        """The plan came back and was retired."""

    def free_resources(self, request: Request) -> None:  # noqa: B027
        """The request finished or was paused. May be called for one that holds nothing."""

    def shutdown(self) -> None:  # noqa: B027
        """The engine ends; called once."""


class SequenceSlots(BaseResourceManager):
    """Rows of the workers' per-request arrays, kept by a request for as long as it is resident.

    The lowest free slot is given out first, so the rows in use stay dense and the same run gives the same slots. The
    engine acquires a slot while it books a start; ``free_resources`` gives it back.
    """

    name = "sequence slots"

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ConfigError("max_num_seqs", num_slots, "1 or more")
        self.num_slots = num_slots
        self._free = list(range(num_slots))
        heapify(self._free)
        self._held = [False] * num_slots

    def needed(self, request: RequestView) -> int:
        return 0 if request.is_resident else 1

    def available(self) -> int:
        return len(self._free)

    def acquire(self) -> int:
        """The lowest free slot. Admission was checked, so none being left is a bug of ours."""
        assert self._free, "no sequence slot is free"
        slot = heappop(self._free)
        self._held[slot] = True
        return slot

    def release(self, slot: int) -> None:
        assert self._held[slot], f"sequence slot {slot} is not held"
        self._held[slot] = False
        heappush(self._free, slot)

    def free_resources(self, request: Request) -> None:
        if request.slot is not None:
            self.release(request.slot)
            request.slot = None


class ResourceFailure(NamedTuple):
    """A manager raised; the others were still called."""

    manager: str
    error: Exception


class ResourceError(Exception):
    """A manager raised while it was asked about one request: that request is to fail, nobody else."""

    def __init__(self, manager: str, request_id: int, error: Exception) -> None:
        self.manager, self.request_id, self.error = manager, request_id, error
        super().__init__(f"resource {manager} could not be asked: {error!r}")


class ResourceManager:
    """The managers in order: prepared and updated in it, freed and shut down in reverse. Under the state lock.

    No call stops at a manager that raises: all are called, and what was raised comes back as a list, empty when all
    went well, for the engine to fail the requests of that plan. Only ``shortage`` and ``reserve`` raise
    ``ResourceError``: they concern one request.
    """

    def __init__(self, managers: Iterable[BaseResourceManager] = ()) -> None:
        self.managers = list(managers)
        names = [manager.name for manager in self.managers]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("resource managers", names, "one of each name")
        self._reserved = dict.fromkeys(names, 0)
        self._reserved_for: set[int] = set()

    def begin_pass(self) -> None:
        """Forget what ``reserve`` noted; called before each scheduling pass."""
        for name in self._reserved:
            self._reserved[name] = 0
        self._reserved_for.clear()

    def is_reserved_for(self, request_id: int) -> bool:
        """Whether ``reserve`` was called for the request in this pass."""
        return request_id in self._reserved_for

    def shortage(self, request: RequestView) -> str | None:
        """The first resource of which too little is left, beside what was reserved in this pass, for the request."""
        for manager in self.managers:
            try:
                lacks = manager.needed(request) > manager.available() - self._reserved[manager.name]
            except Exception as error:
                raise ResourceError(manager.name, request.request_id, error) from error
            if lacks:
                return manager.name
        return None

    def reserve(self, request: RequestView) -> None:
        """The request becomes resident with the plan being made, whose resources are taken only later."""
        for manager in self.managers:
            try:
                self._reserved[manager.name] += manager.needed(request)
            except Exception as error:
                raise ResourceError(manager.name, request.request_id, error) from error
        self._reserved_for.add(request.request_id)

    def prepare_resources(self, plan: StepPlan) -> list[ResourceFailure]:
        return self._call(self.managers, lambda manager: manager.prepare_resources(plan))

    def update_resources(self, plan: StepPlan) -> list[ResourceFailure]:
        return self._call(self.managers, lambda manager: manager.update_resources(plan))

    def free_resources(self, request: Request) -> list[ResourceFailure]:
        return self._call(reversed(self.managers), lambda manager: manager.free_resources(request))

    def shutdown(self) -> list[ResourceFailure]:
        return self._call(reversed(self.managers), lambda manager: manager.shutdown())

    @staticmethod
    def _call(
        managers: Iterable[BaseResourceManager], call: Callable[[BaseResourceManager], None]
    ) -> list[ResourceFailure]:
        failures = []
        for manager in managers:
            try:
                call(manager)
            except Exception as error:  # noqa: BLE001 - a user's code; it is handed on
                failures.append(ResourceFailure(manager.name, error))
        return failures
