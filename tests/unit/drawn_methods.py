"""Methods with parameters, as hypothesis draws them for workloads."""

from typing import Any

from hypothesis import strategies as st

PYRAMID, MERGING = "pyramidinfer", "minicache"


def a_method(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """A method with its parameters."""
    parameters = {
        "streamingllm": {"sinks": st.integers(0, 6)},
        "snapkv": {"window": st.integers(1, 6)},
        "pyramidkv": {
            "window": st.integers(1, 6),
            "beta": st.sampled_from([1, 2, 20]),
        },
        "pyramidinfer": {
            "recent_ratio": st.sampled_from([0.05, 0.2, 0.4]),
            "decay_ratio": st.sampled_from([0.5, 0.8, 1.0]),
            "strategy": st.sampled_from(["constant", "linear"]),
            "min_context": st.integers(0, 4),
            "sinks": st.integers(0, 2),
            "prune": st.sampled_from([True, True, False]),
            "gen_interval": st.sampled_from([2, 3, 4, 6]),
            "gen_keep_ratio": st.sampled_from([0.0, 0.5, 0.9]),
        },
    }
    return st.sampled_from(names).flatmap(
        lambda name: st.fixed_dictionaries(
            {"method": st.just(name), **parameters[name]}
        )
    )


def a_merge(layers: int) -> st.SearchStrategy[dict[str, Any]]:
    """MiniCache, alone or over a method that selects."""
    return st.fixed_dictionaries(
        {
            "method": st.just(MERGING),
            "start_layer": st.integers(0, layers - 2),
            "retain": st.sampled_from([0.0, 0.05, 0.4, 1.0]),
            "interval": st.sampled_from([None, 1, 2, 3, 5, 8]),
            "over": st.none() | a_method(["streamingllm", "snapkv"]),
        }
    )
