"""Settings as hypothesis draws them: right, nearly right, and anything else."""

from hypothesis import strategies as st

from tests.matrix import METHODS as MATRIX
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.methods import METHODS, load_method

LONGEST_MESSAGE = 2000

numbers = st.sampled_from(
    [0, 1, -1, 7, 64, 100, 0.5, 1.0, 64.0, -0.0, 5e-324, 1e308, 1 - 2**-53]
    + [2**31 - 1, 2**31, 2**63, 2**64, 10**30, -(10**400)]
    + [float("nan"), float("inf"), -float("inf"), True, False]
)
words = st.sampled_from(
    [*METHODS, "", "on", "off", "auto", "cpp", "all", "64", "2K", "true", "null"]
    + ["max", "range", "linear", "incremental", "a\nb", "\u2028", "\x00", "%s{}"]
    + ["x" * 10_000, "/nowhere.json", "\U0001f600"]
)
texts = words | st.text(max_size=8)


def nested(depth: int) -> object:
    """Lists inside lists, or mappings inside mappings."""
    value: object = []
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


scalars = st.none() | numbers | texts
values = st.recursive(
    scalars | st.integers() | st.floats() | st.integers(1, 600).map(nested),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=6,
)

# Values of the right kind, so that a good many mappings are accepted.
LIKELY = {
    "budget": st.integers(1, 4096),
    "keep_ratio": st.floats(0, 1),
    "layer_budgets": st.lists(st.integers(33, 999), max_size=6),
    "layers_per_tier": st.integers(1, 4),
    "prefill": st.sampled_from(["exact", "incremental"]),
    "prefill_interval": st.integers(1, 4096),
    "kernels": st.sampled_from(["cpp", "auto", {"select": "torch"}, {"all": "cpp"}]),
    "interval": st.none() | st.integers(1, 600),
    "start_layer": st.none() | st.integers(0, 9),
    "window": st.integers(1, 64),
    "kernel_size": st.sampled_from([1, 5, 7, 4]),
    "pooling": st.sampled_from(["max", "avg"]),
    "sinks": st.integers(0, 40),
    "prune": st.booleans(),
}
shares = st.sampled_from([0, 0.0, 0.1, 0.5, 0.9, 1 - 2**-53, 1])


def mapping(keys, methods=None, near=True):
    """Some of the keys and perhaps others; their values are mostly of their kind."""
    entries = [
        st.tuples(st.just(key), LIKELY.get(key, shares | values) if near else values)
        for key in keys
    ]
    others = st.tuples(texts, values)
    drawn = st.lists(st.one_of(*entries), max_size=4)
    drawn |= st.lists(st.one_of(*entries, others), max_size=4)
    if methods is None:
        return drawn.map(dict)
    return st.tuples(methods, drawn).map(lambda d: {**dict(d[1]), "method": d[0]})


def of_method(name, common=(), near=True):
    """A method with parameters, and keys that are not its own."""
    keys = [*load_method(name).model_fields, *common]
    return mapping(keys, st.just(name), near) if keys else st.just({"method": name})


def any_method(common=(), near=True):
    names = st.sampled_from(sorted(METHODS))
    return names.flatmap(lambda name: of_method(name, common, near))


LIKELY["decode"] = st.none() | any_method(("interval", "budget")) | st.just({})
LIKELY["over"] = any_method() | st.sampled_from(sorted(METHODS))
LIKELY["request_methods"] = (
    st.lists(st.sampled_from(sorted(METHODS)), max_size=3)
    | st.dictionaries(
        st.sampled_from(sorted(METHODS)),
        any_method().map(lambda own: {k: v for k, v in own.items() if k != "method"}),
        max_size=2,
    )
    | st.dictionaries(texts, any_method() | values, max_size=2)
)
COMMON = sorted({*KVCompressionConfig.model_fields} - {"scorer"})
written = st.one_of(
    any_method(COMMON),
    any_method(COMMON, near=False),
    mapping(COMMON, texts),
    st.sampled_from(MATRIX),
    st.dictionaries(texts | st.integers(), values, max_size=3),
    values,
)


def told(message):
    """It is one short line."""
    assert message
    assert len(message.splitlines()) == 1
    assert len(message) < LONGEST_MESSAGE
