"""One read of what a running server says at ``/metrics``."""

import math
import time
from dataclasses import dataclass, field, fields
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from ..plan import Counters
from .errors import ToolError

PORT = 8000  # vLLM's own, where neither scheme nor port is given
PATIENCE_S = 5
OURS = "vllm:kv_compression_"
SKIPPED = "skipped_"

GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
}
COUNTERS = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits",
    **{
        f"{OURS}{each.name}_total": each.name
        for each in fields(Counters)
        if each.name != "skipped"
    },
}
NAMES = GAUGES | COUNTERS
Figures = dict[str, float]


@dataclass
class Read:
    """What a server says at one time."""

    time: float  # of a clock that nobody sets
    engines: dict[str, Figures] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)
    settings: dict[str, str] | None = None  # None: this server does not compress
    started: float | None = None  # the process, where it says so


def metrics_url(text: str) -> str:
    """Complete an address, of which scheme, port and path may be missing.

    Raises:
        ToolError: It is none.
    """
    has_scheme = "://" in text
    try:
        parts = urlsplit(text if has_scheme else f"http://{text}")
        host = parts.netloc.removesuffix(":")
        if parts.port is None and not has_scheme:
            host += f":{PORT}"
    except ValueError as error:
        raise ToolError(f"{text!r} is no address of a server: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ToolError(f"{text!r} is no address of a server, such as localhost:{PORT}")
    folder = parts.path.rstrip("/").removesuffix("/metrics").removesuffix("/v1")
    return f"{parts.scheme}://{host}{folder}/metrics"


def scrape(url: str) -> Read:
    """Read a server's metrics.

    Raises:
        ToolError: There is no answer, or it is not that of vLLM.
    """
    try:
        with urlopen(url, timeout=PATIENCE_S) as answer:
            read = read_metrics(answer.read().decode())
    except HTTPError as error:
        raise ToolError(f"{url} answered {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise ToolError(f"{url} does not answer: {reason}") from None
    except ValueError:
        raise ToolError(f"{url} answered, but not with metrics") from None
    if not read.engines:
        raise ToolError(f"{url} has no metrics of vLLM")
    return read


def read_metrics(text: str) -> Read:
    """Read metrics from their text.

    Raises:
        ValueError: It has another format.
    """
    read = Read(time.monotonic())
    for family in text_string_to_metric_families(text):
        _collect(family, read)
    return read


def _collect(family: Metric, read: Read) -> None:
    """Add the samples that are of interest."""
    for name, labels, value, *_ in family.samples:
        if name == "process_start_time_seconds":
            read.started = value
        elif name == f"{OURS}config_info":
            others = ("model_name", "engine")
            settings = {k: v for k, v in labels.items() if v and k not in others}
            read.settings = settings
        figure = NAMES.get(name)
        if name == f"{OURS}skipped_total":
            figure = SKIPPED + labels.get("reason", "")
        if figure and math.isfinite(value):
            figures = read.engines.setdefault(labels.get("engine", "0"), {})
            figures[figure] = figures.get(figure, 0) + value
            read.models.update([labels["model_name"]] if "model_name" in labels else [])
