"""Servers of `serving` with one more feature of vLLM. Run by `test_features`.

    python feature_cases.py MODEL OUTPUT TITLE       (no title: without any feature)

OUTPUT holds, by server: the answers to `requests`, with ``compressions`` that were
counted and ``expected``, and ``seen``: proof that the feature was at work. Without any,
and on tensor-parallel workers, also which tokens each worker has ``kept``.
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

# On the path for these only: folders of the root would shadow packages.
sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.engine import kept, v2_harness  # noqa: E402

del sys.path[0]

RANK = 8
AWAKE = 8  # steps
PRIVATE = 60  # blocks beyond those of the longest request
EVEN_TOKENS = r"(<\d*[02468]>){100}"


class Case:
    """One server with a feature: how its requests are served, by ``how``."""

    def __init__(self, llm: Any, model: Path, settings: dict[str, Any]) -> None:
        from tests.engine.serving import requests

        self.llm, self.model = llm, model
        self.asked = requests(settings)
        self.expected = sum(request.compressions for request in self.asked)

    def plain(self) -> dict[str, Any]:
        """All at once."""
        return self._asked(True)

    workers = asynchronous = plain

    def codes(self) -> dict[str, Any]:
        """In one step each and in chunks: the same codes are read."""
        from tests.engine.conftest import scheduler

        self.expected *= 2
        whole = self.plain()
        assert scheduler(self.llm).reset_prefix_cache()
        answers = zip(whole["answers"], self.chunks()["answers"], strict=True)
        pairs = [(mine["tokens"], theirs["tokens"]) for mine, theirs in answers]
        return {"pairs": pairs, "seen": True}

    def _asked(self, seen: bool, **params: Any) -> dict[str, Any]:
        from tests.engine.serving import ask

        answers = ask(self.llm, self.asked, **params)
        return {"answers": [asdict(answer) for answer in answers], "seen": seen}

    def hits(self) -> dict[str, Any]:
        """Again, from the prefix cache."""
        self._asked(True)
        self.expected *= 2
        found = self._asked(True)
        hits = [answer["cached"] for answer in found["answers"]]
        return {**found, "seen": hits == [request.hits for request in self.asked]}

    def chunks(self) -> dict[str, Any]:
        """In steps of few tokens."""
        from tests.engine.conftest import chunks
        from tests.engine.serving import STEP

        # A prompt that is to be pruned waits for a step with room for all of it.
        pruned = any(request.scorer.prunes for request in self.asked)
        with chunks(self.llm, STEP if pruned else 96):
            return self._asked(True)

    def preempted(self, more: int = 0, **params: Any) -> dict[str, Any]:
        """In little space."""
        from tests.engine.conftest import preemptions
        from tests.engine.serving import little_space

        undone = preemptions(self.llm)
        with little_space(self.llm, self.asked, more):
            found = self._asked(True, **params)
        self.expected += sum(undone)
        return {**found, "seen": any(undone)}

    def priorities(self) -> dict[str, Any]:
        """In space that is little, but never too little for private blocks; the last
        ones first."""
        from vllm_kvcompress import stats

        order = list(range(len(self.asked)))[::-1]
        found = self.preempted(more=PRIVATE, priority=order)
        return {**found, "seen": "pool_dry" not in stats(self.llm)["skipped"]}

    def asleep(self) -> dict[str, Any]:
        """Put to sleep in the middle, twice; all KV memory is then overwritten."""
        from tests.engine.conftest import attention, preemptions

        undone, asleep = preemptions(self.llm), []
        engine = self.llm.llm_engine
        step, steps = engine.step, itertools.count()

        def sleeping_step() -> Any:
            if next(steps) in (AWAKE, AWAKE + 9):
                self.llm.sleep(level=1, mode="keep")
                asleep.append(engine.is_sleeping())
                for layer in attention(self.llm):
                    layer.kv_cache.fill_(1e4)
                assert self.llm.wake_up()
            return step()

        engine.step = sleeping_step
        found = self._asked(True)
        self.expected += sum(undone)
        return {**found, "seen": asleep == [True, True] and any(undone)}

    def samples(self) -> dict[str, Any]:
        """Two samples of each, and one by one with their seeds."""
        self.expected *= 4
        both = self._asked(True, n=2, seed=7, temperature=1.0)["answers"]
        pairs = []
        for number, samples in enumerate((both[::2], both[1::2])):
            alone = self._asked(True, seed=7 + number, temperature=1.0)["answers"]
            pairs += [
                (mine["tokens"], theirs["tokens"])
                for mine, theirs in zip(samples, alone, strict=True)
            ]
        return {"pairs": pairs, "seen": True}

    def prompt_logprobs(self) -> dict[str, Any]:
        """Those of a compressed request, beside those of one that is left alone."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": request.tokens} for request in self.asked]

        def rows(own: list[dict[str, Any]]) -> list[list[float]]:
            params = [
                SamplingParams(
                    max_tokens=2, prompt_logprobs=0, detokenize=False, **each
                )
                for each in own
            ]
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
            return [
                [
                    row[token].logprob
                    for token, row in zip(
                        output.prompt_token_ids[1:],
                        output.prompt_logprobs[1:],
                        strict=True,
                    )
                ]
                for output in outputs
            ]

        compressed = rows([request.params for request in self.asked])
        whole = rows([{"extra_args": {"kv_compression": "off"}} for _ in self.asked])
        return {"pairs": list(zip(compressed, whole, strict=True)), "seen": True}

    def structured(self) -> dict[str, Any]:
        """A grammar that allows even tokens, and the same tokens allowed by number."""
        from vllm.sampling_params import StructuredOutputsParams

        from tests.engine.conftest import VOCAB

        self.expected *= 2
        grammar = StructuredOutputsParams(regex=EVEN_TOKENS)
        # The grammar never ends here, so it forbids the end, which is 2.
        allowed = [token for token in range(0, VOCAB, 2) if token != 2]
        found = self._asked(True, structured_outputs=grammar)
        named = self._asked(True, allowed_token_ids=allowed)
        tokens = [
            [answer["tokens"] for answer in answers["answers"]]
            for answers in (found, named)
        ]
        return {"pairs": list(zip(*tokens, strict=True)), "seen": True}

    def beams(self) -> dict[str, Any]:
        """vLLM's beams, and beams by hand; both by the server's own method."""
        from vllm.sampling_params import BeamSearchParams

        own = [r for r in self.asked if r.method == r.config.method]
        beam = BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True)
        outputs = self.llm.beam_search(
            [{"prompt_token_ids": request.tokens} for request in own], beam
        )
        found = [output.sequences[0].tokens[-4:] for output in outputs]
        self.expected = 0  # a beam grows by requests for one token
        by_hand = [self._beam(request.tokens, 2, 4) for request in own]
        return {"pairs": list(zip(found, by_hand, strict=True)), "seen": True}

    def _beam(self, tokens: list[int], width: int, count: int) -> list[int]:
        from vllm import SamplingParams

        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        params = SamplingParams(
            max_tokens=1, logprobs=2 * width, temperature=0.0, detokenize=False
        )
        for _ in range(count):
            prompts = [{"prompt_token_ids": [*tokens, *beam]} for _, beam in beams]
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
            grown = [
                (score + entry.logprob, [*beam, token])
                for (score, beam), output in zip(beams, outputs, strict=True)
                for token, entry in output.outputs[0].logprobs[0].items()
            ]
            beams = sorted(grown, key=lambda each: each[0], reverse=True)[:width]
        return beams[0][1]

    def embeddings(self) -> dict[str, Any]:
        """Rows of the model's own table; again, from the cache, beside tokens."""
        from safetensors.torch import load_file

        from tests.engine.conftest import Answer, generate
        from tests.engine.serving import COUNT

        table = load_file(self.model / "model.safetensors")["model.embed_tokens.weight"]
        rows = [{"prompt_embeds": table[request.tokens]} for request in self.asked]
        each = [request.params for request in self.asked]
        generate(self.llm, rows, COUNT, each=each)
        tokens = [request.given for request in self.asked]
        found = generate(self.llm, [*rows, *tokens], COUNT, each=[*each, *each])
        self.expected *= 3
        again, beside = found[: len(rows)], found[len(rows) :]
        hits = [answer.cached for answer in again]
        alike = all(map(Answer.near, again, beside))
        wanted = [request.hits for request in self.asked]
        answers = [asdict(answer) for answer in again]
        return {"answers": answers, "seen": alike and hits == wanted}

    def lora(self) -> dict[str, Any]:
        """With an adapter; the reference has it merged into its weights."""
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("adapter", 1, str(self.model / "adapter"))
        return self._asked(True, lora_request=adapter)


@contextmanager
def served(model: Path, settings: dict[str, Any], **kwargs: Any) -> Iterator[Any]:
    """A server of `serving`."""
    from tests.engine.conftest import engine
    from tests.engine.serving import ENGINE

    config = {"kv_compression": settings}
    with engine(model, additional_config=config, **{**ENGINE, **kwargs}) as llm:
        yield llm


def main(model: str, output: str, title: str = "") -> None:
    """Serve all servers."""
    from tests.features import FEATURES, Feature

    named = {feature.title: feature for feature in FEATURES}
    feature = named[title] if title else Feature("")
    switches = v2_harness.boot(v2=False)
    switches.async_scheduling = feature.how == "asynchronous"
    import torch

    from tests.engine.serving import SERVERS
    from vllm_kvcompress import stats

    found = {}
    own: dict[str, Any] = dict(feature.engine)
    if feature.how in TOKENIZED:
        own["skip_tokenizer_init"] = False
    for name in SERVERS.keys() - {*feature.cannot}:
        settings = SERVERS[name]
        with served(Path(model), settings, **own) as llm:
            case = Case(llm, Path(model), settings)
            listens = not title or "tensor_parallel_size" in own
            if listens:
                llm.collective_rpc(kept.listen)
            found[name] = getattr(case, feature.how)()
            if listens:
                found[name]["kept"] = llm.collective_rpc(kept.kept)
            found[name]["compressions"] = stats(llm)["compressions"]
            found[name]["expected"] = case.expected
    torch.save(found, output)


TOKENIZED = ("structured", "beams")

if __name__ == "__main__":
    main(*sys.argv[1:])
