"""The state of one server process: engine, tokenizer, queue, thread pools, metrics, and whether it accepts work.

Not here: routes (see `server/http/routes`).
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from engine.types import StepReport
from model.budget import ExpertBudget
from model.errors import CheckpointError, EngineDown, InvalidRequest, MoedialError
from server.access.keys import read_keys
from server.access.quotas import Account
from server.dialects.base import Dialect
from server.errors import TooManyConnections, code_of, http_error_of
from server.event_loop.thread_pools import BoundedThreadPool
from server.experts.calibration import UNCALIBRATED, ServedCalibration
from server.experts.choice import Chooser
from server.experts.load import LoadMeter
from server.experts.lowering import TICK_SECONDS, Lowering, Queue
from server.experts.options import CalibratedOptions
from server.experts.policies import Load
from server.experts.served_models import ServedModels
from server.experts.sets import NO_SETS, ServedSets
from server.generation.admission import Admission
from server.generation.compiling import GrammarCheckQueue
from server.metrics import NO_ROUTE, Metrics
from server.processes import watch_processes
from server.protocols import ChatTemplateProtocol, EngineProtocol, TokenizerProtocol
from server.settings import Settings
from server.vllm_metrics import VllmNames

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Service:
    """One model being served, from loading to draining."""

    def __init__(
        self,
        settings: Settings,
        engine: EngineProtocol,
        tokenizer: TokenizerProtocol,
        chat: ChatTemplateProtocol | None,
        card: Mapping[str, Any],
        sampling_defaults: Mapping[str, Any],
        dialect: Dialect,
        calibration: ServedCalibration = UNCALIBRATED,
        sets: ServedSets = NO_SETS,
    ) -> None:
        self.settings, self.engine, self.tokenizer = settings, engine, tokenizer
        self.chat, self.card, self.calibration, self.sets = chat, card, calibration, sets
        self.dialect = dialect  # how the model writes calls and reasoning
        self.sampling_defaults = sampling_defaults  # by request field, for requests that do not set it
        self.compiler = GrammarCheckQueue(engine)
        self.metrics = Metrics(settings.name)
        self.keys = read_keys(settings.api_keys, settings.api_keys_file)
        limits = self.keys.limits.items()
        self.accounts = {name: Account(name, limit) for name, limit in limits}
        shares = {name: account.limits.share_of_places for name, account in self.accounts.items()}
        held_shares = {name: share for name, share in shares.items() if share}
        self.admission = Admission(settings.max_running, settings.queue_size, settings.max_queued_tokens, held_shares)
        waiting = self.admission.capacity  # no more calls than these are held, so that none is refused here
        self.body_parsing = BoundedThreadPool("large bodies", 2, settings.max_connections)
        self.encoding = BoundedThreadPool("tokenising prompts", 2, waiting)
        self.rendering = BoundedThreadPool("chat templates", 2, waiting)
        self.token_routes = BoundedThreadPool("/tokenize and /detokenize", 1, 16)
        self.loaded: ServedModels | None = None
        self.meter: LoadMeter | None = None  # while the model is loaded
        self.lowering: Lowering | None = None  # with --brownout
        self.chooser = Chooser(CalibratedOptions(), self._load)
        self.boot_error: Exception | None = None  # why the model could not be loaded
        self.drain_started: float | None = None
        self.cut_short = False  # whether a second signal ended the wait for running requests
        self.seen_fields: set[str] = set()  # unknown body fields that have been logged
        self._reported = 0  # the restart count at the last report
        self._watch()
        watch_processes(self.metrics.registry, lambda: engine.pid)
        if settings.metrics_compat == "vllm":
            self.metrics.registry.register(VllmNames(self.metrics))
        engine.on_report = self._on_report

    async def boot(self) -> None:
        """Start the engine and wait until the model has been loaded.

        Raises:
            CheckpointError: the model cannot be loaded, or the operator's counts do not fit it.
        """
        await self.engine.start()
        await self.engine.ready(self.settings.load_timeout)
        if self.engine.info is None:
            raise EngineDown("the engine is ready but says nothing of its model")
        try:
            created = int(time.time())
            info, sources = self.engine.info, (self.card, created, self.calibration, self.sets)
            self.loaded = ServedModels.build(self.settings, info, *sources)
        except InvalidRequest as error:
            raise CheckpointError(error.message) from None
        self._choose_by(self.loaded)
        self.metrics.set_count_labels(self.loaded.counts)
        info = self.engine.info
        self.metrics.watch("engine_info", lambda: 1, info.device, info.backend, info.kernels)
        self.metrics.watch("cache_config_info", lambda: 1, str(info.block_size), str(info.kv_blocks))
        self.metrics.watch("default_num_experts", lambda: self.loaded.default_count if self.loaded else 0)

    def _choose_by(self, models: ServedModels) -> None:
        """From now on choose among the options of the loaded model."""
        info, steps = models.info, models.lowering
        budget = ExpertBudget((models.default_count,) * info.experts.layers)
        self.meter = LoadMeter(models.options.options, budget, info.experts, info.step_cost)
        self.chooser = Chooser(models.options, self._load)
        if steps:
            lowering = Lowering(steps, self.meter, self.settings.max_running, self.settings.brownout_itl)
            self.lowering = lowering
            self.metrics.watch("brownout_level", lambda: lowering.level)
            self.metrics.watch("brownout_lowest_level", lambda: lowering.lowest_level)
            self.metrics.watch("brownout_relative_quality", lambda: lowering.relative_quality)
            self.chooser = Chooser(models.options, self._load, lambda: lowering.option, self._on_lowered)

    def _load(self, more: int) -> Load:
        """The load with `more` sequences than run now."""
        running = min(self.settings.max_running, self.admission.running + more)
        return Load(max(1, running), self.meter.slowdown(time.monotonic()) if self.meter else 1.0)

    def _on_lowered(self, sequences: int) -> None:
        self.metrics.inc("experts_lowered", "brownout", by=sequences)

    async def watch_load(self) -> None:
        """With --brownout, follow the load for ever."""
        while self.lowering is not None:
            queue = self.admission.fair_queue
            state = Queue(queue.waiting, queue.oldest_s, queue.held)
            self.lowering.tick(time.monotonic(), state)
            await asyncio.sleep(TICK_SECONDS)

    def salt_of(self, key_name: str) -> str:
        """What keeps the cached prefixes of a key's requests apart from others; empty: shared by all."""
        sharing = self.settings.prefix_sharing
        return key_name if sharing == "key" or (sharing == "auto" and len(self.keys) > 1) else ""

    def charge(self, key_name: str, prompt_tokens: int) -> None:
        """Charge an accepted prompt to its key, if there are keys."""
        if (account := self.accounts.get(key_name)) is not None:
            account.spend_tokens(prompt_tokens)
            self.metrics.inc("key_tokens", key_name, "prompt", by=prompt_tokens)

    @property
    def tokenizer_info(self) -> dict[str, Any]:
        """The names that lm-evaluation-harness and vLLM use; a checkpoint without such a token has null."""
        named = self.tokenizer.named
        special = {name: named.get(name) for name in SPECIAL_TOKENS}
        info = self.served_models.info
        template = None if self.chat is None else self.chat.source
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "chat_template": template,
            "model_max_length": info.max_model_len,
            "vocab_size": info.vocabulary,
        }

    @property
    def served_models(self) -> ServedModels:
        """The loaded model and its aliases. Raises EngineDown while it is being loaded."""
        if self.loaded is None:
            raise EngineDown("the model is still being loaded; try again later")
        return self.loaded

    def check_ready(self) -> ServedModels:
        """Raises EngineDown with the reason where no work is accepted."""
        if self.loaded is not None and self.draining:
            raise EngineDown("the server is shutting down; try another one")
        return self.check_engine()

    def check_engine(self) -> ServedModels:
        """Raises EngineDown with the reason while the model is not loaded or the engine does not run."""
        served_models = self.served_models
        if self.engine.state != "ready":
            raise EngineDown(f"the engine is {self.engine.state}; try again later")
        return served_models

    @property
    def draining(self) -> bool:
        return self.drain_started is not None

    def drain(self) -> None:
        """Accept no more work. It only sets a flag, so that a signal handler may call it."""
        if self.drain_started is None:
            self.drain_started = time.monotonic()

    @property
    def drained(self) -> bool:
        """Whether all requests have ended, or the time for them is over."""
        if self.drain_started is None:
            return False
        overdue = time.monotonic() - self.drain_started > self.settings.drain_seconds
        return self.cut_short or self.admission.held == 0 or overdue

    def on_connection_refused(self, error: MoedialError) -> None:
        """Count a refusal that was sent before there was a request with a path."""
        self.metrics.inc("http_requests", NO_ROUTE, NO_ROUTE, str(http_error_of(error).status))
        if isinstance(error, TooManyConnections):
            self.metrics.inc("requests_rejected", code_of(error))

    def _on_report(self, report: StepReport) -> None:
        self._reported = self.engine.restarts
        self.metrics.on_report(report)
        if self.meter is not None:
            self.meter.record(report.stats, time.monotonic())

    def _watch(self) -> None:
        watch = self.metrics.watch
        watch("engine_up", lambda: float(self.engine.state == "ready"))
        watch("engine_restarts", lambda: self.engine.restarts)
        watch("engine_seconds_since_report", lambda: self.engine.silence)
        watch("num_requests_running", lambda: self._gauge("running"))
        watch("num_requests_waiting", lambda: self.admission.waiting + self._gauge("waiting"))
        watch(
            "oldest_waiting_seconds", lambda: max(self.admission.fair_queue.oldest_s, self._gauge("oldest_waiting_s"))
        )
        watch("kv_cache_usage_perc", lambda: self._gauge("blocks_used") / max(1.0, self._gauge("blocks_total")))
        watch("step_unique_experts", lambda: self._gauge("distinct_experts"))
        watch("expert_load_imbalance", lambda: self._gauge("load_imbalance"))

    def _gauge(self, name: str) -> float:
        """The last step's figure; 0 where the engine is down, or a new process has run no step yet."""
        runs = self.engine.state == "ready" and self._reported == self.engine.restarts
        last = self.metrics.last if runs else None
        return float(getattr(last, name)) if last is not None else 0.0
