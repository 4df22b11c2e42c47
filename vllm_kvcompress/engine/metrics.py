"""Counters on their way from the scheduler to ``/metrics`` and the log.

vLLM's statistics are a typed message; the one dict in it that reaches the front
end takes our counts along, and they are taken out before vLLM's loggers look.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import (
    AggregateStatLoggerBase,
    PrometheusStatLogger,
    StatLoggerManager,
)
from vllm.v1.metrics.stats import (
    IterationStats,
    MultiModalCacheStats,
    SchedulerStats,
)

from ..config import KVCompressionConfig
from ..plan import Counters
from .args import config_of

logger = init_logger("vllm.plugins.kv_compression")

PREFIX = "kv_compression:"
SKIPPED = f"{PREFIX}skipped:"
MICROSECONDS = 1e6

COUNTERS = {
    "compressions": "Compressions, once per KV cache group.",
    "tokens_evicted": "Tokens dropped from the KV cache, per group.",
    "tokens_merged": "Tokens for which a layer reads its neighbour's KV, per group.",
    "blocks_freed": "KV blocks given back to the pool.",
    "logical_tokens": "Tokens that were held before these compressions, per group.",
    "retained_tokens": "Tokens that are held after them.",
    "seconds": "Time that workers spent on compression.",
}
# Reasons that dashboards see at zero; others appear when they happen.
REASONS = ("short", "off", "one_token", "pool_dry", "session", "invalid")


def attach(stats: SchedulerStats, unsent: Counters) -> None:
    """Move counts into a message to the front end.

    Every count is sent once: with several API servers each message goes to one of
    them, and their metrics are added up.
    """
    carrier = stats.num_kv_fetch_reqs_by_stage
    for name in COUNTERS:
        if value := getattr(unsent, name):
            scale = MICROSECONDS if name == "seconds" else 1
            carrier[PREFIX + name] = round(value * scale)
    for reason, count in unsent.skipped.items():
        carrier[SKIPPED + reason] = count
    vars(unsent).update(vars(Counters()))


def extract(stats: SchedulerStats) -> Counters:
    """Take the counts out of a message again."""
    carrier = stats.num_kv_fetch_reqs_by_stage
    counts = Counters()
    for key in [key for key in carrier if key.startswith(PREFIX)]:
        value = carrier.pop(key)
        name = key.removeprefix(PREFIX)
        if key.startswith(SKIPPED):
            counts.skipped[key.removeprefix(SKIPPED)] = value
        elif name == "seconds":
            counts.seconds = value / MICROSECONDS
        else:
            setattr(counts, name, value)
    return counts


@functools.cache
def install() -> None:
    """Give the front ends of engines that compress a logger of ours."""
    StatLoggerManager.__init__ = _with_logger(StatLoggerManager.__init__)


def _with_logger(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        config = config_of(vllm_config)
        if config is None:
            return
        prometheus = next(
            stat_logger
            for stat_logger in self.stat_loggers
            if isinstance(stat_logger, PrometheusStatLogger)
        )
        # vLLM's own line is off, too, where a process sees only some statistics.
        writes_log = (
            kwargs.get("enable_default_loggers", True)
            and kwargs.get("client_count", 1) == 1
        )
        # First in the list, so that it sees the message before the others do;
        # made last, since a PrometheusStatLogger drops all older metrics.
        self.stat_loggers.insert(0, _Logger(config, prometheus, writes_log))

    return __init__


class _Logger(AggregateStatLoggerBase):
    """Feeds Prometheus, beside vLLM's own metrics, and writes the log line."""

    def __init__(
        self,
        config: KVCompressionConfig,
        prometheus: PrometheusStatLogger,
        writes_log: bool,
    ) -> None:
        labels = prometheus.per_engine_labelvalues
        names = ["model_name", "engine"]
        self._labels = labels
        self._writes_log = writes_log
        self._unlogged = {engine: Counters() for engine in labels}
        self._counters = {
            name: prometheus._counter_cls(
                name=f"vllm:kv_compression_{name}",
                documentation=documentation,
                labelnames=names,
            )
            for name, documentation in COUNTERS.items()
        }
        self._skipped = prometheus._counter_cls(
            name="vllm:kv_compression_skipped",
            documentation="Prompts left uncompressed, by reason.",
            labelnames=[*names, "reason"],
        )
        settings = {"budget": "", "keep_ratio": "", **config.settings()}
        info = prometheus._gauge_cls(
            name="vllm:kv_compression_config_info",
            documentation="Settings of the KV cache compression.",
            multiprocess_mode="mostrecent",
            labelnames=[*names, *settings],
        )
        for values in labels.values():
            info.labels(*values, *map(str, settings.values())).set(1)
            for counter in self._counters.values():
                counter.labels(*values)
            for reason in REASONS:
                self._skipped.labels(*values, reason)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """See `StatLoggerBase.record`."""
        if scheduler_stats is None:
            return
        counts = extract(scheduler_stats)
        if counts == Counters():
            return
        values = self._labels[engine_idx]
        for name, counter in self._counters.items():
            counter.labels(*values).inc(getattr(counts, name))
        for reason, count in counts.skipped.items():
            self._skipped.labels(*values, reason).inc(count)
        self._unlogged[engine_idx].add(counts)

    def log(self) -> None:
        """Write one line per engine that compressed or skipped something."""
        for engine, counts in self._unlogged.items():
            if not self._writes_log or counts == Counters():
                continue
            logger.info("Engine %03d: %s", engine, _line(counts))
            self._unlogged[engine] = Counters()

    def log_engine_initialized(self) -> None:
        """See `StatLoggerBase.log_engine_initialized`; nothing to say."""


def _line(counts: Counters) -> str:
    parts = [
        f"KV compressions: {counts.compressions}",
        f"tokens: {counts.logical_tokens} -> {counts.retained_tokens}",
        f"blocks freed: {counts.blocks_freed}",
        f"time: {counts.seconds:.2f} s",
    ]
    if counts.skipped:
        reasons = (f"{reason} {n}" for reason, n in counts.skipped.items())
        parts.append(f"skipped: {', '.join(reasons)}")
    return ", ".join(parts)
