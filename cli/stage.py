"""``llm-engine stage``: one pipeline stage on this host, for an engine on another one."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import ConfigError
from ..core.stage_settings import check_pipeline_address, parse_cpus

if TYPE_CHECKING:
    from ..engine.executors.zmq_process import StageProcess
    from ..workers.control import Launch

_LOOK_SECONDS = 1.0
_MAX_STOPPED = 2
"""Looks in a row at which it was."""
_REJOIN_SECONDS = 0.5
_END_SECONDS = 3.0


def run(args: argparse.Namespace) -> int:
    """Write a key, or be a stage until the engine ends; returns the exit code."""
    from ..workers.pipeline_key import new_key, read_key, write_key

    if args.new_key is not None:
        write_key(Path(args.new_key), new_key())
        print(f"{args.new_key}: copy it to every host of the pipeline, and keep it secret")
        return 0
    for name in ("join", "index", "pipeline_key"):
        if getattr(args, name) is None:
            raise ConfigError(name, None, "one, to join an engine; or --new-key FILE, to make the key for it")
    check_pipeline_address(args.join)
    if args.index < 0:
        raise ConfigError("index", args.index, "the number of a stage, from 0")
    cpus = None if args.cpus is None else parse_cpus(args.cpus)
    if args.cpus is not None and (cpus is None or not cpus <= os.sched_getaffinity(0)):
        raise ConfigError("cpus", args.cpus, "CPUs this process may use, like 0-3,8")
    if args.cpu_threads is not None and args.cpu_threads < 1:
        raise ConfigError("cpu_threads", args.cpu_threads, "a number of threads, from 1")
    if args.model is not None and not os.path.isdir(args.model):
        raise ConfigError("model", args.model, "the folder of a checkpoint")

    from ..workers.control import Launch

    key = read_key(Path(args.pipeline_key))
    return serve(
        Launch(
            control=args.join,
            token=key.token.hex(),
            index=args.index,
            parent_pid=os.getpid(),
            remote=True,
            key=(key.public, key.secret),
            host=args.bind,
            model=args.model,
            cpus=None if cpus is None else sorted(cpus),
            num_threads=args.cpu_threads,
            log_level=logging.INFO,
        )
    )


def serve(launch: Launch) -> int:
    """Run the stage in a process of its own, anew each time that it and the engine have lost one another."""
    from ..engine.executors.zmq_process import StageProcess
    from ..workers.control_link import EXIT_DONE, EXIT_FAILED

    pause = threading.Event()
    while True:
        _say(launch.index, f"joining {launch.control}; Ctrl-C ends it")
        process = StageProcess(launch)
        try:
            how = _await_end(process)
        finally:
            process.ask_to_end()
            if not process.wait(_END_SECONDS):
                process.kill()
                process.wait(_END_SECONDS)
        if process.first_words:
            _say(launch.index, f"{how}, before it joined:\n{process.first_words}")
        if process.exit_code in (EXIT_DONE, EXIT_FAILED):
            return process.exit_code
        _say(launch.index, f"{how}; joining again")
        pause.wait(_REJOIN_SECONDS)


def _await_end(process: StageProcess) -> str:
    """How it ended. One that somebody stops (SIGSTOP) is killed: the engine has given it up by then."""
    num_stopped = 0
    while (how := process.poll()) is None:
        num_stopped = num_stopped + 1 if process.is_stopped else 0
        if num_stopped > _MAX_STOPPED:
            process.kill()
        process.wait(_LOOK_SECONDS)
    return how


def _say(index: int, text: str) -> None:
    print(f"stage {index}: {text}", file=sys.stderr, flush=True)
