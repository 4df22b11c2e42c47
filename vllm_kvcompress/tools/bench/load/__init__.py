"""`kvcompress bench serve` and `throughput`: vLLM's own benchmarks, arm by arm."""
