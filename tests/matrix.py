"""Every method with settings that are easy and settings that are hard for it.

Tests of what all methods promise run over this list. An entry is what users write as
`kv_compression` settings; a method may have several.
"""

METHODS = [
    {"method": "snapkv", "budget": 256, "window": 32},
    {"method": "snapkv", "budget": 64, "window": 1, "kernel_size": 1},
    {"method": "snapkv", "keep_ratio": 0.5, "window": 16, "pooling": "avg"},
    {"method": "streamingllm", "budget": 256, "sinks": 4},
    {"method": "streamingllm", "keep_ratio": 0.25, "sinks": 0},
]
