"""The library's face: prompts in, answers out, from any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypedDict, Unpack, cast

from prometheus_client import CollectorRegistry

from ..core.config import EngineConfig, EngineSettings
from ..core.errors import CapacityError, ConfigError, EngineDeadError, InvalidParamsError, QueueFullError
from ..core.outputs import RequestOutput
from ..core.sampling_params import SamplingParams
from ..core.trace import StepStats
from ..kvcache.resources import BaseResourceManager
from ..workers.model_engine import ModelEngine
from ..workers.sampler import BatchSampler, SamplerFactory
from .assembly import check_names
from .collector import RequestCollector
from .delta import Sink
from .engine import Engine
from .executors.registry import ExecutorSpec, check_executor, make_executor
from .input_processor import InputProcessor, Prompt
from .loading import ModelSource, find_model, loading_bar
from .stream import QueueSink, RequestStream
from .tokenizer import Message, Tokenizer

Params = SamplingParams | Sequence[SamplingParams] | None


class RequestOptions(TypedDict, total=False):
    """What may be said of a request beside its prompt and parameters."""

    request_id: str | None
    """Shown in its outputs; made up when absent."""
    priority: int
    """Lower goes first, where the ordering knows priorities; another one takes 0 only."""
    deadline_ms: float | None
    """From now until its last token should be there, where the ordering knows deadlines; another one takes none."""
    tenant: str | None
    """On whose behalf; some orderings share out by it."""
    adapter_id: str | None
    cache_salt: str | None
    """Requests share cached prefixes only with requests of the same salt."""


class LLM:
    """One engine and its model; a context manager. Every method may be called from any thread.

    ``model`` is a local folder or a hub name; the bundled demo model when absent. The keywords are the fields of
    ``EngineConfig`` (``llm-engine serve --help`` lists them with their meaning). ``registry``: a ``CollectorRegistry``
    to share; a private one when absent, at ``llm.registry``. ``resources``: resource managers of your own that gate
    admission, or their names; those that are named stand first. ``model_engine``: makes the model of each stage, in
    place of torch's; ``sampler``: makes the last stage's.

    Raises ``ConfigError`` for a bad setting, ``ModelLoadError`` for a checkpoint that cannot be served.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        registry: CollectorRegistry | None = None,
        resources: Sequence[BaseResourceManager | str] = (),
        model_engine: Callable[[int], ModelEngine] | None = None,
        show_progress: bool = False,
        served_model_name: str | None = None,
        engine_label: str | None = None,
        sampler: SamplerFactory = BatchSampler,
        **settings: Unpack[EngineSettings],
    ) -> None:
        named, managers = _sort_resources(resources)
        self.config = EngineConfig.of(model=model, resources=named, **settings)
        check_names(self.config)
        check_executor(self.config.parallel.executor)
        source = ModelSource(None, "custom") if model_engine else find_model(self.config.model)
        self.model_name = served_model_name or source.name
        self.default_sampling: Mapping[str, Any] = source.default_sampling
        """What the checkpoint's generation_config asks for; used where a request brings no parameters of its own."""
        self.tokenizer: Tokenizer | None = source.tokenizer(self.config.model)
        on_cuda = source.on_cuda(self.config.model)
        with loading_bar(show_progress) as progress:
            spec = ExecutorSpec(
                config=self.config,
                make_model_engine=model_engine or source.model_engines(self.config, on_cuda),
                block_size=self.config.cache.block_size or (64 if on_cuda else 16),
                make_sampler=sampler,
                progress=progress,
                model_path=None if model_engine else source.path,
                on_cuda=on_cuda,
            )
            self._engine = Engine(
                self.config,
                make_executor(spec),
                on_cuda=on_cuda,
                registry=registry,
                model_name=self.model_name,
                engine_label=engine_label,
                resources=managers,
            )
        info = self._engine.info.model
        self.max_model_len = info.max_model_len
        self._inputs = InputProcessor(
            info,
            self._engine.kv,
            self.tokenizer,
            max_chunk=self._engine.limits.max_num_batched_tokens,
            seed=self.config.model.seed,
            knows=self._engine.knows,
        )

    # -- asking

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: int = 0,
        deadline_ms: float | None = None,
        tenant: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one or many prompts (texts or token ids); outputs in the order of the prompts.

        A request that fails has ``FinishReason.ERROR`` and ``error`` in its outputs; the others are not affected.
        Raises ``InvalidParamsError`` before anything is submitted, ``EngineDeadError`` if the engine dies.
        """
        many = _as_list(prompts)
        of_all = RequestOptions(priority=priority, deadline_ms=deadline_ms, tenant=tenant)
        return self._run(many, self._params_for(many, sampling_params, {}), use_tqdm, of_all)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: int = 0,
        deadline_ms: float | None = None,
        tenant: str | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one or many conversations through the chat template; ``template`` goes to ``render_chat``.

        Without parameters an answer may fill the rest of the context.
        """
        first = messages[0] if isinstance(messages, Sequence) and messages else None
        many = cast(Any, messages if isinstance(first, Sequence) and not isinstance(first, str) else [messages])
        prompts: list[Prompt] = [self.render_chat(conversation, **template) for conversation in many]
        of_all = RequestOptions(priority=priority, deadline_ms=deadline_ms, tenant=tenant)
        return self._run(prompts, self._params_for(prompts, sampling_params, {"max_tokens": None}), use_tqdm, of_all)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **request: Unpack[RequestOptions]
    ) -> RequestStream:
        """Answer one prompt as an iterator of what is new. Keep the ``LLM`` while you iterate: it ends with it."""
        sink = QueueSink()
        collector = self._collector(prompt, params or self.default_params(), sink, True, request)
        self._submit([collector])
        return RequestStream(collector, sink)

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, **request: Unpack[RequestOptions]
    ) -> Future[RequestOutput]:
        """Answer one prompt in the background. Cancelling the future ends the request; callbacks run in one thread of
        the engine and may close it."""
        sink = self._engine.delivery().sink()
        collector = self._collector(prompt, params or self.default_params(), sink, False, request)
        future = sink.collect_with(collector)
        self._submit([collector])
        return future

    def render_chat(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """Token ids of a conversation. Raises ``InvalidParamsError`` naming the message at fault."""
        if self.tokenizer is None:
            raise InvalidParamsError("messages", messages, "token ids: this engine has no tokenizer")
        return self.tokenizer.render_chat(messages, **template)

    def default_params(self, **changes: Any) -> SamplingParams:
        """The parameters of a request that brings none: the checkpoint's, with ``changes``."""
        return SamplingParams(**{**self.default_sampling, **changes})

    # -- looking

    @property
    def registry(self) -> CollectorRegistry:
        """The Prometheus registry with this engine's metrics."""
        return self._engine.registry

    @property
    def engine(self) -> Engine:
        """The engine under it, for tools that look deeper."""
        return self._engine

    @property
    def is_ready(self) -> bool:
        """Whether a request would be begun now. While stages are started again it is not ready, and takes requests."""
        return self._engine.is_ready

    @property
    def unready_reason(self) -> str | None:
        """Why it is not ready, in a line; ``None`` when it is."""
        return self._engine.unready_reason

    @property
    def dead_cause(self) -> EngineDeadError | None:
        """Why the engine cannot go on; ``None`` while it can."""
        return self._engine.dead_cause

    def get_stats(self) -> list[StepStats]:
        """The last steps, oldest first: at most a thousand, or ``trace_steps`` where a trace is asked for."""
        return list(self._engine.stats.copy())  # copied at once: the output thread appends meanwhile

    def write_trace(self, path: str) -> None:
        """Write a step trace of these steps now, whole or not at all; Perfetto opens it, and ``llm-engine trace``.

        The setting ``trace`` writes one when the engine ends. Raises ``OSError``.
        """
        self._engine.trace.write(path)

    # -- ending

    def close(self) -> None:
        """End the engine; requests that have not finished fail with ``EngineDeadError``. May be called twice."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside

    def _params_for(self, prompts: list[Prompt], params: Params, defaults: dict[str, Any]) -> list[SamplingParams]:
        if params is None:
            params = self.default_params(**defaults)
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if isinstance(params, str | bytes) or not isinstance(params, Sequence):
            raise InvalidParamsError("sampling_params", params, "SamplingParams, or a list of them")
        if len(params) != len(prompts):
            raise InvalidParamsError("sampling_params", f"{len(params)} of them", f"one, or {len(prompts)}")
        return list(params)

    def _collector(
        self, prompt: Prompt, params: SamplingParams, sink: Sink, streaming: bool, request: Mapping[str, Any]
    ) -> RequestCollector:
        with self._counting_refusals():
            requests = self._inputs.make_requests(prompt, params, sink, **request)
        text = prompt if isinstance(prompt, str) else None
        return RequestCollector(requests, text, self.tokenizer, self._engine.state.abort, streaming=streaming)

    def _submit(self, collectors: list[RequestCollector]) -> None:
        with self._counting_refusals():
            self._engine.state.submit(request for collector in collectors for request in collector.requests)

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except InvalidParamsError:
            self._engine.metrics.record_rejected("invalid")
            raise
        except CapacityError as error:
            self._engine.metrics.record_rejected("queue_full" if isinstance(error, QueueFullError) else "capacity")
            raise

    def _run(
        self, prompts: list[Prompt], params: list[SamplingParams], use_tqdm: bool, of_all: RequestOptions
    ) -> list[RequestOutput]:
        sink = QueueSink()
        collectors = [
            self._collector(prompt, one, sink, False, of_all) for prompt, one in zip(prompts, params, strict=True)
        ]
        by_id = {request_id: collector for collector in collectors for request_id in collector.request_ids}
        self._submit(collectors)
        left = len(collectors)
        try:
            with _progress_bar(left, use_tqdm) as bar:
                while left:
                    for delta in sink.take(None):
                        collector = by_id[delta.request.request_id]
                        was_finished = collector.finished
                        collector.take(delta)
                        if delta.error is not None:
                            collector.raise_if_dead()
                        if collector.finished and not was_finished:
                            left -= 1
                            bar(collector)
        except BaseException:
            self._engine.state.abort([i for c in collectors for i in c.unfinished_ids])
            raise
        return [collector.result() for collector in collectors]


def _sort_resources(resources: Any) -> tuple[tuple[str, ...], list[BaseResourceManager]]:
    """The names and the managers among them. Raises ``ConfigError`` for what is neither."""
    if isinstance(resources, str) or not isinstance(resources, Sequence):
        raise ConfigError("resources", resources, "a list of resource managers and their names")
    managers = [resource for resource in resources if not isinstance(resource, str)]
    for manager in managers:
        if not isinstance(manager, BaseResourceManager) or not isinstance(getattr(manager, "name", None), str):
            raise ConfigError("resources", manager, "a BaseResourceManager with a name, or the name of one")
    return tuple(resource for resource in resources if isinstance(resource, str)), managers


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Sequence) and not isinstance(prompts, bytes):
        if prompts and all(isinstance(item, int) for item in prompts):
            return [cast(Prompt, prompts)]
        if prompts:
            return list(prompts)
    raise InvalidParamsError("prompts", prompts, "a text, a list of token ids, or a list of at least one of these")


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[RequestCollector], None]]:
    if not shown:
        yield lambda collector: None
        return
    from tqdm import tqdm

    tokens = [0, 0]
    with tqdm(total=total, desc="Requests", unit="req", dynamic_ncols=True) as bar:

        def advance(collector: RequestCollector) -> None:
            tokens[0] += len(collector.requests[0].prompt_token_ids)
            tokens[1] += sum(request.num_output_tokens for request in collector.requests)
            elapsed = max(bar.format_dict["elapsed"], 1e-6)
            bar.set_postfix_str(f"{tokens[0] / elapsed:.0f} in, {tokens[1] / elapsed:.0f} out tok/s", refresh=False)
            bar.update()

        yield advance
