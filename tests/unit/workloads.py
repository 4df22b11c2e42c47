"""Crowded little engines for the simulator, as hypothesis thinks of them."""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from tests.shadow import BLOCK, answer
from tests.unit.drawn_methods import MERGING, PYRAMID, a_merge, a_method
from vllm_kvcompress.config import KEY, KVCompressionConfig
from vllm_kvcompress.engine.runner import RunnerV1, RunnerV2

MAX_LEN = 64
LAYERS_PER_GROUP = 2
SOME_TOKENS = [1, 2, 5, 9, 16, 30]
RUNNERS = {"V1": RunnerV1, "V2": RunnerV2}


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, what it shares with others, and what it wants."""

    step: int
    shared: int
    turn: int
    own: int
    max_tokens: int
    extra_args: dict[str, Any] | None = None
    priority: int = 0

    def prompt(self, number: int) -> list[int]:
        """A start that others have, the model's answer to it, and a question."""
        tokens = [1 + 7 * i % 43 for i in range(self.shared)]
        for _ in range(self.turn if tokens else 0):
            tokens.append(answer(tokens))
        tokens += [1 + (11 * i + 5 * number) % 47 for i in range(self.own)]
        return tokens[: MAX_LEN - 1] or [1]


@dataclass(frozen=True)
class Workload:
    """An engine and what happens to it.

    Attributes:
        settings: Of compression.
        groups: A letter for each KV cache group: C compressed, W sliding window.
            Where budgets differ by layer, each C is a tier.
        disturbances: ``(step, what, which request)``.
        drafts: The most that a step verifies of each request, and
        lookahead: whether the drafting model writes KV for them.
        stages: Of a pipeline; as many steps are under way at once.
    """

    settings: dict[str, Any]
    arrivals: list[Arrival]
    disturbances: list[tuple[int, str, int]] = field(default_factory=list)
    groups: str = "C"
    runner: str = "V1"
    asynchronous: bool = False
    stages: int = 1
    caching: bool = True
    policy: str = "fcfs"
    chunk: int = 64
    long_prefill: int = 0
    max_seqs: int = 6
    spare_blocks: int = 0
    reserve: bool = True
    drafts: int = 0
    lookahead: bool = False

    @property
    def in_flight(self) -> int:
        """Steps that are scheduled before the first one's tokens are known."""
        return self.stages + self.asynchronous

    @property
    def room(self) -> int:
        """Tokens for which each step has room, whatever else it does."""
        room = self.chunk - self.max_seqs
        return min(room, self.long_prefill or room)

    def tiers(self) -> dict[int, tuple[int, ...]]:
        """Layers that share a group's budget, by group."""
        compressed = [i for i, letter in enumerate(self.groups) if letter == "C"]
        if self.settings["method"] == MERGING:  # one layer each: lone, shallow, deep
            scorer = KVCompressionConfig.from_dict(self.settings).scorer
            pairs = scorer.layer_pairs(len(compressed))
            shallow, deep = (list(part) for part in zip(*pairs, strict=True))
            lone = {*range(len(compressed))} - {*shallow, *deep}
            order = [(layer,) for layer in [*sorted(lone), *shallow, *deep]]
            return dict(zip(compressed, order, strict=True))
        layers = list(range(self.groups.count("C") * LAYERS_PER_GROUP))
        tiered = "layer_budgets" in self.settings
        tiered = tiered or self.settings["method"] in ("pyramidkv", "pyramidinfer")
        found = {}
        for group, letter in enumerate(self.groups):
            if letter == "C":
                first = self.groups[:group].count("C") * LAYERS_PER_GROUP
                own = layers[first : first + LAYERS_PER_GROUP]
                found[group] = tuple(own if tiered else layers)
        return found


# What hypothesis draws ----------------------------------------------------------------


@dataclass(frozen=True)
class _Needs:
    """What all methods of a server need: `least` tokens, chunks of a `window`."""

    least: int
    window: int


@st.composite
def _settings(
    draw: st.DrawFn,
    layers: int,
    decode: bool,
    layered: bool,
    incremental: bool,
    pyramid: bool,
    merging: bool,
) -> tuple[dict[str, Any], _Needs]:
    """What a server compresses, when, and how much of it."""
    plain = ["streamingllm", "snapkv"]
    sizes = ["budget", "budget", "budget", "keep_ratio"]
    first = [*plain, "pyramidkv"] if layered else plain
    settings = draw(a_method([PYRAMID] if pyramid and layered else first))
    if merging:
        first, sizes = plain, ["budget", "budget", "keep_ratio"]
        settings = draw(a_merge(layers))
    elif layered and settings["method"] in plain:
        sizes = ["layer_budgets"]
    elif incremental:
        sizes = ["budget"]
    methods = [dict(settings), *([settings["over"]] if settings.get("over") else [])]
    if decode:
        rule = pyramid and not layered
        follows = a_method([PYRAMID]) if rule else st.just({}) | a_method(plain)
        settings["decode"] = draw(follows)
        methods += [dict(settings["decode"])] if settings["decode"] else []
    if draw(st.integers(0, 3)) == 0:
        alone = merging or incremental or not layered
        offered = first if alone else [*first, PYRAMID]
        names = [name for name in offered if name != settings["method"]]
        others = [draw(a_method([name])) for name in names if draw(st.booleans())]
        methods += others
        settings["request_methods"] = {
            other["method"]: {k: v for k, v in other.items() if k != "method"}
            for other in others
        }
    window = max(method.get("window", 0) for method in methods)
    sinks = [m.get("sinks", 0) + (m["method"] == PYRAMID) for m in methods]
    kept = max(window, *sinks, 1)
    least = BLOCK + kept - 1
    budget = st.integers(least, least + 12)
    size = draw(st.sampled_from(sizes))
    if all(method["method"] in (PYRAMID, MERGING) for method in methods):
        pass
    elif size == "budget":
        settings[size] = draw(budget)
    elif size == "keep_ratio":
        settings[size] = draw(st.sampled_from([0.3, 0.6] + [1.0] * 2 * decode))
    else:
        budgets = st.lists(budget, min_size=layers, max_size=layers)
        settings[size] = draw(budgets)
    if decode and settings["decode"].get("method", settings["method"]) != PYRAMID:
        interval = draw(st.sampled_from([3, 4, 7, 12]))
        settings["decode"]["interval"] = max(interval, window, 1)
        if draw(st.booleans()) or settings.get("keep_ratio") == 1.0:
            settings["decode"]["budget"] = draw(budget)
    if incremental:
        interval = draw(st.sampled_from([5, 8, 11, 16]))
        settings["prefill"] = "incremental"
        settings["prefill_interval"] = max(interval, window)
    return settings, _Needs(least, window)


@st.composite
def _wish(draw: st.DrawFn, settings: dict[str, Any], least: int) -> dict[str, Any]:
    """What a request asks for itself."""
    kinds = ["", "", "", "", "budget", "method"]
    kind = draw(st.sampled_from(kinds + ["off"] * ("prefill" not in settings)))
    if kind == "off":
        return {KEY: "off"}
    wish = {}
    if kind == "method":
        others = list(settings.get("request_methods", ()))
        wish[KEY] = draw(st.sampled_from(["on", settings["method"], *others]))
    method = wish.get(KEY, "on")
    method = settings["method"] if method == "on" else method
    if method == PYRAMID or (method == MERGING and not settings["over"]):
        return wish  # its own parameters say what is kept
    if kind and draw(st.booleans() if kind == "method" else st.just(True)):
        fixed = settings.get("budget") or max(settings.get("layer_budgets", [MAX_LEN]))
        wish[f"{KEY}_budget"] = draw(st.integers(least, max(least, fixed)))
    return wish


@st.composite
def workloads(
    draw: st.DrawFn,
    decode: bool | None = None,
    layered: bool | None = None,
    incremental: bool | None = None,
    pyramid: bool | None = None,
    merging: bool | None = None,
    **fixed: Any,
) -> Workload:
    """Prompts around the budget, and pools just large enough.

    Args:
        draw: Hypothesis.
        decode: Whether requests are compressed while they generate; None = drawn.
        layered: Whether budgets differ by layer.
        incremental: Whether prompts are compressed while they are read.
        pyramid: Whether PyramidInfer reads prompts, or at least rules the answers.
        merging: Whether layers merge; then only how is drawn of the above.
        fixed: Fields of the workload that are not drawn.
    """
    seldom = st.sampled_from([False, False, True])
    if merging is None:
        others = (decode, layered, incremental, pyramid)
        merging = others == (None,) * 4 and "groups" not in fixed and draw(seldom)
    if merging:
        decode, layered, incremental, pyramid = False, True, False, False
    if incremental is None:
        incremental = not pyramid and decode is not False and draw(seldom)
    if decode is None:
        decode = incremental or draw(st.booleans())
    if pyramid is None:
        pyramid = not incremental and draw(seldom)
    if layered is None:
        layered = draw(seldom) != pyramid
    plain = ["C", "C", "CC", "CW", "CWC"]
    choice = st.sampled_from(["CC", "CWC"] if layered else plain)
    if merging:
        choice = st.sampled_from(["CC", "CC", "CWC", "CCC", "CCCC", "CCCCC"])
    groups = fixed.pop("groups", None) or draw(choice)
    layers = groups.count("C") * (1 if merging else LAYERS_PER_GROUP)
    kind = (decode, layered, incremental, pyramid, merging)
    settings, needs = draw(_settings(layers, *kind))
    if "W" in groups:  # the pruner knows compressed layers only
        others = settings.get("request_methods", {}).values()
        for method in (settings, settings.get("decode", {}), *others):
            if "prune" in method:
                method["prune"] = False
    budget = settings.get("budget", needs.least + 6)
    lengths = [0, 8, 15, 16, 17, 24, 31, 40]
    starts = draw(st.lists(st.sampled_from(lengths), min_size=1, max_size=3))
    arrivals: list[Arrival] = []
    step = 0
    for _ in range(draw(st.integers(1, 10))):
        step += draw(st.sampled_from([0, 0, 0, 1, 4]))
        shared = draw(st.sampled_from(starts))
        edge = max(0, budget - shared)
        own = draw(
            st.sampled_from([0, 0, 1, 3])
            | st.integers(0, 20)
            | st.integers(max(0, edge - 1), edge + 1)
        )
        arrivals.append(
            Arrival(
                step,
                shared,
                draw(st.sampled_from([0, 0, 3, 9])),
                own,
                draw(st.sampled_from([1, 9, 30, 40] if pyramid else SOME_TOKENS)),
                draw(_wish(settings, needs.least)) or None,
                draw(st.integers(0, 2)),
            )
        )
    kinds = st.sampled_from(["abort", "late abort", "reset", "again"])
    events = st.tuples(st.integers(0, 50), kinds, st.integers(0, 9))
    choices = {
        "runner": st.sampled_from(sorted(RUNNERS)),
        "asynchronous": st.booleans(),
        "caching": st.sampled_from([True, True, False]),
        "policy": st.sampled_from(["fcfs", "fcfs", "priority"]),
        "chunk": st.sampled_from([24, 64] if pyramid else [5, 8, 13, 24, 64]).map(
            lambda n: max(n, needs.window)
        ),
        "long_prefill": st.sampled_from([0, 0, max(7, needs.window)]),
        "max_seqs": st.integers(1, 6),
        "spare_blocks": st.sampled_from([0, 0, 0, 2, 6, 20]),
        "reserve": st.just(False) if incremental else st.booleans(),
        "drafts": st.sampled_from([0] if "stages" in fixed else [0, 0, 1, 3, 5]),
        "lookahead": st.booleans(),
    }
    rest = {name: draw(choice) for name, choice in choices.items() if name not in fixed}
    disturbances = draw(st.lists(events, max_size=4))
    return Workload(settings, arrivals, disturbances, groups, **rest, **fixed)
