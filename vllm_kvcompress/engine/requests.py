"""Per-request settings, from ``SamplingParams.extra_args`` (HTTP: ``vllm_xargs``).

``{"kv_compression": "off"}`` leaves one request as it is, the name of a method that
the server offers compresses it with that one, and ``{"kv_compression_budget": 512}``
keeps fewer tokens of it than the server would. ``{"kv_compression_usage": true}`` has
the answer tell how many were kept.
"""

import functools
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import KEY, KVCompressionConfig
from ..parsing import shown
from .args import config_of
from .shared_models import prompt_logprobs_refusal

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

BUDGET_KEY = f"{KEY}_budget"
USAGE_KEY = f"{KEY}_usage"


@dataclass(frozen=True)
class RequestSettings:
    """What one request asks for.

    Attributes:
        enabled: Whether it may be compressed.
        budget: Upper bound on its budget in tokens, None = the server's.
        method: How its prompt is compressed, None = the server's way.
    """

    enabled: bool = True
    budget: int | None = None
    method: str | None = None


class RequestError(ValueError):
    """A per-request setting that cannot be met.

    Attributes:
        field: The key in ``extra_args``.
    """

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        super().__init__(f"{field}={shown(value)} is not possible; allowed: {allowed}")
        self.field = field


def request_settings(
    extra_args: Mapping[str, Any] | None,
    config: KVCompressionConfig,
    block_size: int | None,
) -> RequestSettings:
    """Read and check one request's settings.

    Args:
        extra_args: Of the request; other plugins' keys are ignored.
        config: Of the server.
        block_size: Tokens per KV block, None if not known yet.

    Raises:
        RequestError: Unknown key, wrong type, or more than the server allows.
    """
    mine = {k: v for k, v in (extra_args or {}).items() if str(k).startswith(KEY)}
    mode = mine.pop(KEY, None)
    budget = mine.pop(BUDGET_KEY, None)
    usage = mine.pop(USAGE_KEY, None)
    for key, value in mine.items():
        raise RequestError(key, value, f"the keys {KEY}, {BUDGET_KEY} and {USAGE_KEY}")
    if usage not in (None, True, False):  # vLLM reads JSON's true as 1
        raise RequestError(USAGE_KEY, usage, "true and false")
    methods = (config.method, *config.request_methods)
    modes = ["on", *dict.fromkeys(methods)]
    if config.prefill == "exact":
        modes.insert(0, "off")  # else its prompt might never find room
    if mode is not None and mode not in modes:
        raise RequestError(KEY, mode, ", ".join(map(repr, modes)))
    scorer = config.request_methods.get(mode or "on", config.scorer)
    if budget is not None and scorer.owns_budget:
        raise RequestError(BUDGET_KEY, budget, f"none with {scorer.name}")
    if budget is not None:
        least = config.smallest_budget(block_size or 1)
        fixed = config.budget or max(config.layer_budgets or [0])
        if type(budget) is not int or not least <= budget <= (fixed or budget):
            most = f" to {fixed}" if fixed else ""
            raise RequestError(BUDGET_KEY, budget, f"whole numbers from {least}{most}")
    method = mode if mode in config.request_methods else None
    return RequestSettings(mode != "off", budget, method)


def asks_for_usage(params: "SamplingParams | None") -> bool:
    """Whether a request wants to be told what became of it."""
    return bool(params and params.extra_args and params.extra_args.get(USAGE_KEY))


@functools.cache
def install() -> None:
    """Check requests before an engine sees them, where one is started that must."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    InputProcessor._validate_params = _checking_first(InputProcessor._validate_params)
    AsyncLLM.generate = _checking_at_call(AsyncLLM.generate)


def _check(vllm_config: "VllmConfig", params: Any) -> None:
    """Raise what vLLM answers with HTTP 400."""
    if getattr(params, "prompt_logprobs", None) is not None:
        _check_prompt_logprobs(vllm_config)
    extra_args = getattr(params, "extra_args", None)
    if not extra_args or (config := config_of(vllm_config)) is None:
        return
    from vllm.exceptions import VLLMValidationError

    try:
        request_settings(extra_args, config, vllm_config.cache_config.block_size)
    except RequestError as error:
        raise VLLMValidationError(str(error), parameter=error.field) from None


def _check_prompt_logprobs(vllm_config: "VllmConfig") -> None:
    if reason := prompt_logprobs_refusal(vllm_config):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(reason, parameter="prompt_logprobs")


def _check_session(vllm_config: "VllmConfig") -> None:
    """Refuse what might wait for room for ever, since it is never compressed."""
    config = config_of(vllm_config)
    if config is not None and config.prefill == "incremental":
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"{KEY}: a streaming session cannot be served with prefill='incremental'; "
            "start the server with prefill='exact'",
            parameter="prompt",
        )


def _checking_first(validate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(validate)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        _check(self.vllm_config, params)
        return validate(self, params, *args, **kwargs)

    return _validate_params


def _checking_at_call(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Check when an answer is asked for, not when it is first iterated.

    By then a streaming response has sent its status 200.
    """

    @functools.wraps(generate)
    def checked(
        self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _check(self.vllm_config, sampling_params)
        if isinstance(prompt, AsyncGenerator):
            _check_session(self.vllm_config)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    return checked
