"""One model being served: engine, tokenizer, queue, thread pools, and whether it takes work.

Not here: routes (see `server/http/routes`), and what several models share (see `server/models`).
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from engine.types import StepReport
from model.budget import ExpertBudget
from model.errors import CheckpointError, EngineDown, InvalidRequest
from server.access.access import Access
from server.dialects.base import Dialect
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
from server.processes import watch_processes
from server.protocols import ChatTemplateProtocol, EngineProtocol, TokenizerProtocol
from server.settings import Settings
from server.state import ServerState
from server.vllm_metrics import VllmNames

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Service(ServerState):
    """One model being served, from loading to draining; where it is the only one, the state of the server."""

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
        access: Access | None = None,
    ) -> None:
        """`access`: of the server, where this is one of several models."""
        super().__init__(settings, settings.name, access or Access.read(settings))
        self.engine, self.tokenizer = engine, tokenizer
        self.chat, self.card, self.calibration, self.sets = chat, card, calibration, sets
        self.dialect = dialect  # how the model writes calls and reasoning
        self.sampling_defaults = sampling_defaults  # by request field, for requests that do not set it
        self.compiler = GrammarCheckQueue(engine)
        shares = {name: account.limits.share_of_places for name, account in self.accounts.items()}
        held_shares = {name: share for name, share in shares.items() if share}
        self.admission = Admission(settings.max_running, settings.queue_size, settings.max_queued_tokens, held_shares)
        waiting = self.admission.capacity  # no more calls than these are held, so that none is refused here
        self.encoding = BoundedThreadPool("tokenising prompts", 2, waiting)
        self.rendering = BoundedThreadPool("chat templates", 2, waiting)
        self.token_routes = BoundedThreadPool("/tokenize and /detokenize", 1, 16)
        self.loaded: ServedModels | None = None
        self.expected: ServedModels | None = None  # where several are served, what is known before one is loaded
        self.meter: LoadMeter | None = None  # while the model is loaded
        self.lowering: Lowering | None = None  # with --brownout
        self.chooser = Chooser(CalibratedOptions(), self._load)
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
        self.calibration.warn_of_differences(info)
        self._choose_by(self.loaded)
        self.metrics.set_count_labels(self.loaded.counts)
        info = self.engine.info
        self.metrics.watch("engine_info", lambda: 1, info.device, info.backend, info.kernels)
        self.metrics.watch("cache_config_info", lambda: 1, str(info.block_size), str(info.kv_blocks))
        self.metrics.watch("default_num_experts", lambda: self.loaded.default_count if self.loaded else 0)

    async def stop(self, timeout: float) -> None:
        await self.engine.stop(timeout)

    @property
    def booted(self) -> bool:
        return self.loaded is not None

    @property
    def held(self) -> int:
        return self.admission.held

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
        """The load if `more` sequences ran in addition."""
        running = min(self.settings.max_running, self.admission.running + more)
        return Load(max(1, running), self.meter.slowdown(time.monotonic()) if self.meter else 1.0)

    def _on_lowered(self, sequences: int) -> None:
        self.metrics.inc("experts_lowered", "brownout", by=sequences)

    async def watch_load(self) -> None:
        """With --brownout, update the brownout by the load, until cancelled."""
        while self.lowering is not None:
            queue = self.admission.fair_queue
            state = Queue(queue.waiting, queue.oldest_s, queue.held)
            self.lowering.tick(time.monotonic(), state)
            await asyncio.sleep(TICK_SECONDS)

    def salt_of(self, key_name: str) -> str:
        """The salt of a key's requests in the prefix cache; empty: prefixes are shared by all keys."""
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
        info = self.described.info
        template = None if self.chat is None else self.chat.source
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "chat_template": template,
            "model_max_length": info.max_model_len,
            "vocab_size": info.vocabulary,
        }

    @property
    def described(self) -> ServedModels:
        """The model and its aliases as far as they are known: also those of a model that was not loaded yet, where
        several are served. Raises EngineDown."""
        return self.loaded or self.expected or self.served_models

    def listed_models(self) -> list[ServedModels]:
        return [self.served_models]

    def loaded_models(self) -> list[ServedModels]:
        return [self.served_models]

    def model_cards(self) -> list[dict[str, Any]]:
        return list(self.served_models.cards())

    def model_card(self, model: str) -> dict[str, Any]:
        return self.served_models.card(model)

    def exposition(self) -> bytes:
        return self.metrics.exposition()

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
        watch("prefix_snapshots", lambda: self._gauge("snapshots"))
        watch("prefix_snapshot_bytes", lambda: self._gauge("snapshot_bytes"))
        watch("step_unique_experts", lambda: self._gauge("distinct_experts"))
        watch("expert_load_imbalance", lambda: self._gauge("load_imbalance"))

    def _gauge(self, name: str) -> float:
        """The last step's figure; 0 where the engine is down, or a new process has run no step yet."""
        runs = self.engine.state == "ready" and self._reported == self.engine.restarts
        last = self.metrics.last if runs else None
        return float(getattr(last, name)) if last is not None else 0.0
