"""Every method with settings that are easy and settings that are hard for it.

Tests of what all methods promise run over this list. An entry is what users write as
`kv_compression` settings; a method may have several.
"""

METHODS = [
    {"method": "snapkv", "budget": 256, "window": 32},
    {"method": "snapkv", "budget": 64, "window": 1, "kernel_size": 1},
    {"method": "snapkv", "keep_ratio": 0.5, "window": 16, "pooling": "avg"},
    {"method": "ada_snapkv", "budget": 256, "layers_per_tier": 1},
    {"method": "ada_snapkv", "keep_ratio": 0.3, "window": 8, "floor": 0.0},
    {"method": "pyramidkv", "budget": 256, "layers_per_tier": 1},
    {"method": "pyramidkv", "keep_ratio": 0.4, "window": 8, "beta": 3},
    {"method": "pyramidinfer", "prune": False},
    {"method": "pyramidinfer", "prune": False, "layers_per_tier": 1, "sinks": 0},
    {"method": "minicache", "start_layer": 0},
    {"method": "minicache", "start_layer": 0, "over": "snapkv", "budget": 256},
    {"method": "streamingllm", "budget": 256, "sinks": 4},
    {"method": "streamingllm", "keep_ratio": 0.25, "sinks": 0},
    {"method": "tova", "budget": 256},
    {"method": "tova", "keep_ratio": 0.25},
    {"method": "keydiff", "budget": 256},
    {"method": "keydiff", "keep_ratio": 0.25},
    {"method": "knorm", "budget": 256},
    {"method": "knorm", "keep_ratio": 0.25},
    {"method": "rkv", "budget": 256},
    {"method": "rkv", "keep_ratio": 0.5, "window": 1, "kernel_size": 1, "recent": 0},
    {"method": "random", "budget": 256},
    {"method": "random", "keep_ratio": 0.25, "seed": 7},
]
