"""Counters from the scheduler to Prometheus and the log."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.engine import metrics
from vllm_kvcompress.plan import Counters

pytestmark = pytest.mark.vllm

CONFIG = KVCompressionConfig.from_dict({"method": "snapkv", "budget": 512})
LABELS = {"model_name": "m", "engine": "0"}


def some_counts():
    return Counters(
        compressions=12,
        tokens_evicted=184320,
        blocks_freed=1440,
        logical_tokens=196608,
        retained_tokens=12288,
        seconds=0.25,
        skipped={"short": 3, "off": 1},
    )


def test_round_trip_as_vllm_sends_it():
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"waiting_for_capacity": 2})
    unsent = some_counts()
    metrics.attach(stats, unsent)
    assert unsent == Counters()
    frames = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(frames).scheduler_stats
    assert metrics.extract(received) == some_counts()
    assert received.num_kv_fetch_reqs_by_stage == {"waiting_for_capacity": 2}
    assert metrics.extract(received) == Counters()


def test_nothing_to_send_adds_nothing():
    stats = SchedulerStats()
    metrics.attach(stats, Counters())
    assert stats == SchedulerStats()


@pytest.fixture
def stat_logger():
    unregister_vllm_metrics()
    prometheus = SimpleNamespace(
        per_engine_labelvalues={0: ["m", "0"]},
        _counter_cls=PrometheusStatLogger._counter_cls,
        _gauge_cls=PrometheusStatLogger._gauge_cls,
    )
    yield metrics._Logger(CONFIG, prometheus, writes_log=True)
    unregister_vllm_metrics()


def sample(name, **labels):
    return REGISTRY.get_sample_value(f"vllm:kv_compression_{name}", LABELS | labels)


def test_counters_start_at_zero(stat_logger):
    for name in metrics.COUNTERS:
        assert sample(f"{name}_total") == 0
    assert sample("skipped_total", reason="short") == 0
    settings = {key: str(value) for key, value in CONFIG.settings().items()}
    assert sample("config_info", keep_ratio="", **settings) == 1


def test_counters_add_up(stat_logger):
    for _ in range(2):
        stats = SchedulerStats()
        metrics.attach(stats, some_counts())
        stat_logger.record(stats, None, engine_idx=0)
        assert stats.num_kv_fetch_reqs_by_stage == {}
    stat_logger.record(None, None)
    assert sample("compressions_total") == 24
    assert sample("seconds_total") == 0.5
    assert sample("skipped_total", reason="short") == 6


def test_log_line_only_after_activity(stat_logger, monkeypatch):
    lines = []
    monkeypatch.setattr(metrics.logger, "info", lambda *args: lines.append(args))
    stat_logger.log()
    stats = SchedulerStats()
    metrics.attach(stats, some_counts())
    stat_logger.record(stats, None, engine_idx=0)
    stat_logger.log()
    stat_logger.log()
    assert [text % tuple(values) for text, *values in lines] == [
        "Engine 000: KV compressions: 12, tokens: 196608 -> 12288, "
        "blocks freed: 1440, time: 0.25 s, skipped: short 3, off 1"
    ]


@pytest.mark.parametrize("compresses", [True, False])
def test_manager_gets_our_logger_first(compresses, monkeypatch):
    class Prometheus(PrometheusStatLogger):
        def __init__(self):
            unregister_vllm_metrics()
            self.per_engine_labelvalues = {0: ["m", "0"]}

    def init(self, vllm_config, **kwargs):
        self.stat_loggers = ["other", Prometheus()]

    monkeypatch.setattr(StatLoggerManager, "__init__", metrics._with_logger(init))
    settings = {"kv_compression": CONFIG.settings()} if compresses else {}
    config = SimpleNamespace(additional_config=settings)
    manager = StatLoggerManager(vllm_config=config, client_count=2)
    names = [type(stat_logger).__name__ for stat_logger in manager.stat_loggers]
    assert names == ["_Logger"] * compresses + ["str", "Prometheus"]
    assert (sample("compressions_total") == 0) is compresses
    unregister_vllm_metrics()
