"""Invariants, checked in a running engine when ``VLLM_KVCOMPRESS_CHECK`` asks for it.

Classes derived from our scheduler and workers do it, so that an engine without it
has nothing of it.
"""
