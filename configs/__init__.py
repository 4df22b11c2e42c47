"""Presets: files for ``vllm serve MODEL --config FILE``."""
