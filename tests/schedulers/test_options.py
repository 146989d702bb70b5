"""Options reach the part that has them, with the type its own dataclass says; everything else is refused at start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from llm_engine.core.config import SchedulerConfig, option
from llm_engine.core.errors import ConfigError
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.options import Chosen, make_options, sort_options
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from llm_engine.schedulers.registry import find_scheduler, make_scheduler

LIMITS = Limits(4, 4, 16, 4)
HERE = "tests.schedulers.test_options"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderingOptions:
    aging_s: float = option(60.0, "seconds")
    top: int = option(3, "how many")
    strict: bool = option(False, "whether")
    mode: str = option("plain", "how", choices=("plain", "fancy"))
    limit: int | None = option(None, "at most")
    names: tuple[str, ...] = option((), "who")
    shared: int = option(1, "capacity has one too")

    def __post_init__(self) -> None:
        if self.aging_s <= 0:
            raise ConfigError("aging_s", self.aging_s, "seconds above 0")


class Ordering(FcfsOrdering):
    Options = OrderingOptions

    def __init__(self, options: OrderingOptions | None = None) -> None:
        super().__init__()
        self.options = options


@dataclass(frozen=True)
class CapacityOptions:
    shared: int = 5
    watermark: float = 0.0


class Capacity(MaxUtilization):
    Options = CapacityOptions

    def __init__(self, options: CapacityOptions) -> None:
        super().__init__()
        self.own = options


class Whole:
    Options = CapacityOptions

    def __init__(self, limits: Limits, options: CapacityOptions) -> None:
        self.limits, self.own = limits, options

    add = abort = schedule = update = lambda self, *_: None
    has_work = False


class Deaf(Whole):
    """Has options and cannot be told them."""

    def __init__(self, limits: Limits) -> None: ...


class NoDataclass(FcfsOrdering):
    Options = int


class Unreadable(FcfsOrdering):
    @dataclass
    class Options:  # type: ignore[assignment]
        table: dict[str, int]


class MustBeTold(FcfsOrdering):
    @dataclass
    class Options:  # type: ignore[assignment]
        weight: int

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.weight = options.weight


class Raises(FcfsOrdering):
    @dataclass
    class Options:  # type: ignore[assignment]
        weight: int = 1

        def __post_init__(self) -> None:
            raise ZeroDivisionError("so it is")


def made(options: dict[str, Any] | None = None, **settings: Any) -> Any:
    settings = {"ordering": f"{HERE}:Ordering", "capacity": f"{HERE}:Capacity", **settings}
    return make_scheduler(SchedulerConfig(scheduler_options=options, **settings), LIMITS)


def test_without_any_the_defaults_hold() -> None:
    scheduler = made()
    assert scheduler.ordering.options == OrderingOptions()
    assert scheduler.capacity.own == CapacityOptions()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("aging_s", "2.5", 2.5),
        ("aging_s", "2", 2.0),
        ("aging_s", "inf", math.inf),
        ("aging-s", "2", 2.0),
        ("ordering.aging_s", "2", 2.0),
        ("top", "7", 7),
        ("strict", "yes", True),
        ("mode", "fancy", "fancy"),
        ("limit", "none", None),
        ("limit", "4", 4),
        ("names", "a, b", ("a", "b")),
        ("aging_s", 2, 2.0),
        ("top", 7, 7),
        ("strict", True, True),
        ("limit", None, None),
        ("names", ["a", "b"], ("a", "b")),
    ],
)
def test_a_text_or_a_value_becomes_what_the_field_is(name: str, text: Any, value: Any) -> None:
    read = getattr(made({name: text}).ordering.options, name.rpartition(".")[2].replace("-", "_"))
    assert read == value
    assert type(read) is type(value)


def test_each_part_gets_its_own() -> None:
    scheduler = made({"ordering.shared": "2", "capacity.shared": 3, "watermark": "0.5"})
    assert scheduler.ordering.options.shared == 2
    assert scheduler.capacity.own == CapacityOptions(3, 0.5)


def test_a_whole_scheduler_is_told_its_options_too() -> None:
    made_whole: Any = make_scheduler(
        SchedulerConfig(scheduler=f"{HERE}:Whole", scheduler_options={"watermark": "0.5", "scheduler.shared": 9}),
        LIMITS,
    )
    assert made_whole.own == CapacityOptions(9, 0.5)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"shared": 1}, "ordering.shared or capacity.shared: several have it"),
        ({"agin_s": 1}, r"aging_s, .* of ordering .*; shared, watermark of capacity .*did you mean 'aging_s'"),
        ({"zzz": 1}, r"scheduler_options is 'zzz'; allowed: aging_s, "),
        ({"capacity.aging_s": 1}, "allowed: ordering.aging_s: it is an option of ordering "),
        ({"capacity.zzz": 1}, "allowed: shared, watermark of capacity"),
        ({"queue.aging_s": 1}, "qualified by ordering or capacity or micro_batch"),
        ({"micro_batch.top": 1}, "allowed: ordering.top"),
        ({"top": 1, "ordering.top": 2}, "top once; it is given twice"),
        ({"top": "many"}, "top is 'many'; allowed: a whole number"),
        ({"top": 1.5}, "top is 1.5; allowed: a whole number"),
        ({"top": True}, "top is True; allowed: a whole number"),
        ({"top": None}, "top is None; allowed: a whole number"),
        ({"strict": "perhaps"}, "strict is 'perhaps'; allowed: true or false"),
        ({"strict": 1}, "strict is 1; allowed: true or false"),
        ({"mode": "fanciest"}, "mode is 'fanciest'; allowed: plain, fancy"),
        ({"mode": 5}, "mode is 5; allowed: text"),
        ({"limit": "x"}, "limit is 'x'; allowed: a whole number or null"),
        ({"names": [1]}, "names is .1.; allowed: a list of names"),
        ({"aging_s": "nan"}, "aging_s is 'nan'; allowed: a number"),
        ({"aging_s": -1}, "aging_s is -1.0; allowed: seconds above 0"),
    ],
)
def test_what_cannot_be_is_refused_at_start(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        find_scheduler(SchedulerConfig(
            ordering=f"{HERE}:Ordering", capacity=f"{HERE}:Capacity", scheduler_options=options,
        ))  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"ordering": f"{HERE}:NoDataclass"}, "a part whose Options is a dataclass; it is <class 'int'>"),
        ({"ordering": f"{HERE}:Unreadable"}, "a part whose Options can be read: field table is no int"),
        ({"ordering": f"{HERE}:MustBeTold"}, r"weight=\.\.\., which ordering .*MustBeTold must be told"),
        ({"ordering": f"{HERE}:Raises"}, r"they raised ZeroDivisionError\('so it is'\)"),
        ({"scheduler": f"{HERE}:Deaf"}, r"a class that is called as Class\(limits, options\)"),
        ({"scheduler": f"{HERE}:Whole", "scheduler_options": {"ordering.x": 1}}, "qualified by scheduler"),
    ],
)
def test_a_part_whose_options_cannot_be_made_is_refused_at_start(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        find_scheduler(SchedulerConfig(**settings))


def test_an_option_of_a_part_that_is_not_chosen_names_both() -> None:
    parts = [Chosen("ordering", "fcfs", FcfsOrdering), Chosen("capacity", "mine", Capacity)]
    with pytest.raises(
        ConfigError, match="ordering fcfs or capacity mine; ordering priority has this one, and is not chosen"
    ):
        sort_options({"aging_s": 1}, parts, lambda name: "ordering priority")


def test_parts_without_options_say_so() -> None:
    with pytest.raises(ConfigError, match="none: ordering fcfs take no options"):
        sort_options({"x": 1}, [Chosen("ordering", "fcfs", FcfsOrdering)])
    assert make_options(Chosen("ordering", "fcfs", FcfsOrdering), {}) is None


def test_every_core_is_made_of_new_parts() -> None:
    make = find_scheduler(SchedulerConfig(ordering=f"{HERE}:Ordering"))
    one, other = make(LIMITS, None), make(LIMITS, None)
    assert one.ordering is not other.ordering
    assert one.capacity is not other.capacity
