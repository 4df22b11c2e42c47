"""An arm answered by a running server of vLLM, over its OpenAI-compatible API."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from ..errors import ToolError
from ..scrape import metrics_url, scrape
from .conversation import (
    FORCED,
    Answer,
    Outcome,
    Question,
    Reference,
    Request,
    Rules,
    converse,
)
from .engine import PROCESSOR
from .metrics import KV_COUNTERS
from .plan import Arm
from .target import Kv, Wave, Work, in_waves, kv_since

PATIENCE_S = 3600.0  # a long queue is no error
ATTEMPTS = 4
RESTING_TRIES = 20  # others may use the server, too


class Connection:
    """One server.

    Attributes:
        url: Its address, without a path.
        name: What it calls its model.
        root: Where it has the model from.
    """

    def __init__(self, address: str) -> None:
        """Find out what is served.

        Raises:
            ToolError: Nobody answers, or it is not a server of vLLM.
        """
        self.url = metrics_url(address).removesuffix("/metrics")
        self._client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        try:
            (model, *_) = self._send("GET", "/v1/models")["data"]
            self.name, self.root = model["id"], model.get("root") or model["id"]
        except (KeyError, TypeError, ValueError):
            raise ToolError(f"{self.url} is no OpenAI-compatible server") from None

    def version(self) -> str | None:
        """Of its vLLM, where it says so."""
        try:
            return self._send("GET", "/version").get("version")
        except ToolError:
            return None

    def settings(self) -> dict[str, str] | None:
        """How it compresses; None if it does not."""
        return scrape(f"{self.url}/metrics").settings

    def kv(self) -> Kv:
        """The plugin's counters, of all engines, once they have come to rest.

        Counts reach the front end a moment after the answers.
        """
        now = self._kv()
        for _ in range(RESTING_TRIES):
            time.sleep(0.2)
            before, now = now, self._kv()
            if before == now:
                break
        return now

    def _kv(self) -> Kv:
        engines = scrape(f"{self.url}/metrics").engines.values()
        return {
            name: sum(each.get(name, 0) for each in engines) for name in KV_COUNTERS
        }

    def complete(self, request: Request, xargs: dict[str, Any]) -> Answer:
        """Send one request and wait for its answer.

        Raises:
            ToolError: It was refused, or failed.
        """
        forced = {FORCED: request.forced} if request.forced else {}
        body = {
            "model": self.name,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": request.ignore_eos,
            "logprobs": request.logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "vllm_xargs": {**xargs, **forced} or None,
        }
        answered = self._send("POST", "/v1/completions", json=body)
        try:
            (choice,) = answered["choices"]
            tokens, finish = choice["token_ids"], choice["finish_reason"]
            tops = (choice["logprobs"] or {}).get("top_logprobs", [])
            top = [{_token_id(k): p for k, p in each.items()} for each in tops]
        except (KeyError, TypeError, ValueError):
            raise ToolError(f"{self.url} does not answer as vLLM does") from None
        if not isinstance(tokens, list):
            raise ToolError(f"{self.url} does not return token ids; is it vLLM?")
        return Answer(tokens, top, finish or "")

    def forces(self, prompt: list[int]) -> bool:
        """Try whether the server was started with our logits processor."""
        wanted = prompt[3::-1]  # backwards, as no model would go on
        request = Request(prompt[:4], wanted, len(wanted), True, None)
        return self.complete(request, {}).tokens == wanted

    def _send(self, method: str, path: str, **body: Any) -> Any:
        """One exchange of JSON; connections that fail are tried again.

        Raises:
            ToolError: In the end there is no answer, or it is an error.
        """
        for attempt in range(ATTEMPTS):
            try:
                answer = self._client.request(method, path, **body)
                break
            except httpx.RequestError as error:
                reason = str(error) or type(error).__name__
                time.sleep(0.25 * 2**attempt)
        else:
            raise ToolError(f"{self.url} does not answer: {reason}")
        if answer.is_error:
            raise ToolError(f"{self.url}{path} answered {_complaint(answer)}")
        try:
            return answer.json()
        except ValueError:
            raise ToolError(f"{self.url}{path} answered, but not with JSON") from None


def _token_id(text: str) -> int:
    """Undo vLLM's ``token_id:5``."""
    return int(text.removeprefix("token_id:"))


def _complaint(answer: httpx.Response) -> str:
    """An error's status and first line."""
    try:
        found = answer.json()
        text = str(found.get("error", found)["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        text = answer.reason_phrase
    first, *_ = text.strip().splitlines() or ["no reason"]
    return f"{answer.status_code}: {first}"


@dataclass(frozen=True)
class Server:
    """Where arms are requests that differ by their ``vllm_xargs``.

    Attributes:
        compressed: Answers all arms, by default stock as well.
        stock: Answers stock.
        batch: Questions that are answered together.
    """

    compressed: Connection
    stock: Connection
    batch: int

    def settings(self) -> dict[str, str]:
        """How the server compresses.

        Raises:
            ToolError: It does not.
        """
        found = self.compressed.settings()
        if found is None:
            raise ToolError(
                f"{self.compressed.url} does not compress; start it with "
                "--kv-compression METHOD"
            )
        return found

    def forces(self, prompt: list[int], needed: bool) -> bool:
        """Whether all servers have our logits processor.

        Raises:
            ToolError: One has not, and it is needed.
        """
        for server in (self.stock, self.compressed):
            if not server.forces(prompt):
                if needed:
                    raise ToolError(
                        "--question outside needs a server with our logits processor; "
                        f"start {server.url} with --logits-processors {PROCESSOR}"
                    )
                return False
        return True

    def waves(self, arm: Arm, work: Work, rules: Rules, log: Any) -> Iterator[Wave]:
        """See `Target`; nothing is logged here."""
        is_stock = arm.settings is None
        server = self.stock if is_stock else self.compressed
        xargs = {} if is_stock and server is not self.compressed else _xargs(arm)

        def answer(each: tuple[Question, Reference | None]) -> Outcome:
            talk = converse(each[0], rules, each[1])
            try:
                request = next(talk)
                while True:
                    request = talk.send(server.complete(request, xargs))
            except StopIteration as end:
                return end.value

        with ThreadPoolExecutor(self.batch) as threads:
            for wave in in_waves(work, self.batch):
                before = None if is_stock else server.kv()
                start = time.perf_counter()
                outcomes = list(threads.map(answer, wave))
                seconds = time.perf_counter() - start
                kv = kv_since(before, server.kv()) if before else None
                yield Wave(outcomes, kv, seconds)


def _xargs(arm: Arm) -> dict[str, Any]:
    """What a request says to be answered by this arm."""
    if arm.settings is None:
        return {"kv_compression": "off"}
    budget = arm.own.get("budget")
    return {
        "kv_compression": arm.method,
        **({"kv_compression_budget": budget} if budget else {}),
    }
