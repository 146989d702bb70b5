"""Sequence slots and the ordered container, with a manager as a user would write one."""

import pytest

from llm_engine.core.errors import ConfigError
from llm_engine.core.request import Request, RequestId, RequestState
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import RequestStart, StepPlan
from llm_engine.kvcache.resources import BaseResourceManager, ResourceManager, SequenceSlots


def request(number):
    return Request(RequestId(number), f"r{number}", [1, 2], SamplingParams(), max_total_tokens=4, arrival=0.0)


def plan_starting(*ids):
    starts = [RequestStart(i, 0, [1], 1, [], SamplingParams(), 0, 0, []) for i in ids]
    return StepPlan(queue=0, starts=starts)


class Places(BaseResourceManager):
    """The ten lines of the documentation."""

    def __init__(self, name, places, log=None):
        self.name, self.places, self.log = name, places, [] if log is None else log
        self.held = set()

    def needed(self, request):
        return 0 if request.request_id in self.held else 1

    def available(self):
        return self.places - len(self.held)

    def prepare_resources(self, plan):
        self.log.append(("prepare", self.name))
        self.held.update(start.request_id for start in plan.starts)

    def update_resources(self, plan):
        self.log.append(("update", self.name))

    def free_resources(self, request):
        self.log.append(("free", self.name))
        self.held.discard(request.request_id)

    def shutdown(self):
        self.log.append(("shutdown", self.name))


class Broken(Places):
    def fail(self, *_):
        raise ValueError(self.name)

    prepare_resources = update_resources = free_resources = shutdown = fail


def test_the_lowest_free_slot_comes_first():
    slots = SequenceSlots(4)
    assert [slots.acquire() for _ in range(4)] == [0, 1, 2, 3]
    for slot in (3, 0, 2):
        slots.release(slot)
    assert slots.available() == 3
    assert [slots.acquire() for _ in range(3)] == [0, 2, 3]
    with pytest.raises(AssertionError, match="no sequence slot is free"):
        slots.acquire()


def test_a_slot_is_released_once():
    slots = SequenceSlots(2)
    slots.release(slots.acquire())
    with pytest.raises(AssertionError, match="slot 0 is not held"):
        slots.release(0)


def test_slots_as_a_resource():
    slots, one = SequenceSlots(1), request(1)
    assert slots.needed(one) == 1
    one.slot = slots.acquire()
    one.move_to(RequestState.PREFILLING)
    assert (slots.needed(one), slots.available()) == (0, 0)
    slots.free_resources(one)
    slots.free_resources(one)  # holds nothing any more
    assert (one.slot, slots.available()) == (None, 1)
    with pytest.raises(ConfigError, match="max_num_seqs"):
        SequenceSlots(0)


def test_order_is_kept_and_freeing_reverses_it():
    log = []
    resources = ResourceManager([Places("a", 2, log), Places("b", 2, log)])
    plan, one = plan_starting(1), request(1)
    assert resources.prepare_resources(plan) == []
    assert resources.update_resources(plan) == []
    assert resources.free_resources(one) == []
    assert resources.shutdown() == []
    assert log == [
        ("prepare", "a"), ("prepare", "b"), ("update", "a"), ("update", "b"),
        ("free", "b"), ("free", "a"), ("shutdown", "b"), ("shutdown", "a"),
    ]  # fmt: skip


@pytest.mark.parametrize("call", ["prepare_resources", "update_resources", "free_resources", "shutdown"])
def test_one_that_raises_does_not_keep_the_others_from_their_turn(call):
    log = []
    resources = ResourceManager([Places("a", 2, log), Broken("bad", 2), Places("c", 2, log), Broken("worse", 2)])
    arguments = [] if call == "shutdown" else [request(1) if call == "free_resources" else plan_starting(1)]
    failures = getattr(resources, call)(*arguments)
    assert sorted(failure.manager for failure in failures) == ["bad", "worse"]
    assert all(str(failure.error) == failure.manager for failure in failures)
    assert sorted(name for _, name in log) == ["a", "c"]


def test_a_shortage_names_the_first_resource_that_lacks():
    resources = ResourceManager([Places("plenty", 9), Places("none", 0), Places("also none", 0)])
    assert resources.shortage(request(1)) == "none"
    assert ResourceManager().shortage(request(1)) is None


def test_what_one_pass_promised_is_not_promised_again():
    resources = ResourceManager([Places("one", 1)])
    resources.begin_pass()
    assert resources.shortage(request(1)) is None
    resources.reserve(request(1))
    assert resources.shortage(request(2)) == "one"
    resources.prepare_resources(plan_starting(1))
    resources.begin_pass()
    assert resources.shortage(request(1)) is None  # holds its place
    assert resources.shortage(request(2)) == "one"
    resources.free_resources(request(1))
    assert resources.shortage(request(2)) is None


def test_two_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="one of each name"):
        ResourceManager([Places("a", 1), Places("a", 1)])


def test_a_manager_must_say_what_it_needs_and_has():
    class Nothing(BaseResourceManager):
        name = "nothing"

    with pytest.raises(TypeError, match="available"):
        Nothing()
