"""What a stage's process does from its start to its end.

The main thread loads the model and executes plans; the side thread (``control_link``) speaks to the engine. The first
line on standard input says whom to join (``control.Launch``); its end is the end of the stage.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import time
from typing import Any

import msgspec
import zmq

from ..core.heap import freeze_heap, keep_freed_memory
from .control import FIRST_WORDS, Allocate, Launch, Loaded, Progress, Ready, Setup
from .control_link import EXIT_DONE, EXIT_FAILED, EXIT_LOST, ControlLink, LogToEngine, StoppedError
from .model_engine import Progress as OnProgress
from .ring import Ring
from .stage import Stage
from .stage_model import imported, make_model_engine, memory_name
from .stage_runner import StageRunner
from .stage_sockets import StageSockets
from .wire import PlanBounds

_MOST_FIRST_WORDS = 1 << 16
"""Bytes that are passed on of what was written to standard error before this stage joined."""
PROGRESS_SECONDS = 0.05
"""Least time between two reports of loading."""


def run_process() -> None:
    """Run the stage; does not return."""
    faulthandler.enable()
    line = os.read(sys.stdin.fileno(), 65536)
    if not line:
        os._exit(EXIT_DONE)  # who started it has died meanwhile
    launch = msgspec.json.decode(line, type=Launch)
    if os.getppid() != launch.parent_pid:
        os._exit(EXIT_DONE)  # it died before the system was asked to tell
    context: zmq.Context[Any] = zmq.Context()
    _start_io(context, launch)
    if launch.cpus:
        os.sched_setaffinity(0, launch.cpus)  # before torch: the threads it starts inherit it
    ring = None if launch.ring is None else Ring(launch.ring)
    link = ControlLink(launch, context, ring)
    logging.basicConfig(handlers=[LogToEngine(link)], level=launch.log_level, format="%(message)s")
    if launch.remote:
        here = logging.StreamHandler()
        here.setFormatter(logging.Formatter(f"stage {launch.index}: %(message)s"))
        logging.getLogger().addHandler(here)
    link.start()
    _pass_on_first_words()
    try:
        run(launch, link, context, ring)
        assert link.stopped is not None
        code, reason = link.stopped.exit_code, str(link.stopped)
    except StoppedError as stopped:
        code, reason = stopped.exit_code, str(stopped)
    except BaseException as error:  # noqa: BLE001 - told to the engine
        link.fail(error)
        code, reason = EXIT_FAILED, f"{type(error).__name__}: {error}"
    if launch.remote and reason:
        print(f"stage {launch.index}: {reason}", file=sys.stderr, flush=True)
    link.close()
    sys.stderr.flush()
    # Not through the interpreter's own end: libraries' threads and device contexts may take seconds over it.
    os._exit(code)


def run(launch: Launch, link: ControlLink, context: zmq.Context[Any], ring: Ring | None) -> None:
    """From the settings to the last plan. Raises ``StoppedError``, or why it cannot serve at all."""
    setup: Setup = link.expect(Setup)
    sockets = StageSockets(launch, setup, context)
    num_stages = setup.num_stages
    feeds_back = setup.config.scheduler.schedule_ahead
    stage = Stage(
        make_model_engine(setup, launch),
        imported(setup.sampler),
        index=setup.index,
        num_stages=num_stages,
        max_num_seqs=setup.config.scheduler.max_num_seqs,
        feeds_back=feeds_back,
    )
    try:
        info = stage.load(_reporting(link))
        link.send(Loaded(info, sockets.addresses, memory_name(setup.on_cuda)))
        pool: Allocate = link.expect(Allocate)
        stage.allocate(pool.num_blocks, pool.block_size)
        bounds = PlanBounds(
            setup.config.scheduler.max_num_seqs,
            info.max_model_len,
            info.vocab_size,
            pool.num_blocks,
            info.hidden_size,
        )
        outbound = sockets.connected(pool.next_address)
        far_ring = None if pool.first_address is None else sockets.connected(pool.first_address)
        runner = StageRunner(stage, sockets.inbound, outbound, ring, far_ring, bounds, link)
        freeze_heap()
        keep_freed_memory()
        link.send(Ready())
        try:
            runner.serve()
        except BaseException as error:
            link.fail(error)
            raise StoppedError(EXIT_LOST, f"{type(error).__name__}: {error}") from error
    finally:
        stage.release()


def _start_io(context: zmq.Context[Any], launch: Launch) -> None:
    """Start the thread for sockets, before this one is pinned: on the stage's own cores it would wait for a forward."""
    with contextlib.ExitStack() as before:
        if launch.patient_io:
            with contextlib.suppress(OSError):  # a sandbox may know no policies
                if os.sched_getscheduler(0) == os.SCHED_OTHER:
                    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # which the thread inherits
                    before.callback(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
        context.socket(zmq.PULL).close(0)


def _pass_on_first_words() -> None:
    """From here on the engine is told what goes wrong: standard error is that of whoever started this process, which
    is standard output so far, and gets what was written up to now."""
    with contextlib.suppress(OSError):
        if os.readlink("/proc/self/fd/2").startswith(f"/memfd:{FIRST_WORDS}"):
            words = os.pread(2, _MOST_FIRST_WORDS, 0)
            os.ftruncate(2, 0)
            os.dup2(1, 2)
            os.write(2, words)


def _reporting(link: ControlLink) -> OnProgress:
    """Tells the engine of loading, now and then and at the end."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= PROGRESS_SECONDS:
            last = now
            link.send(Progress(done, total))

    return report
