"""Models that share KV across layers: YOCO, CLA, LCKV; for vLLM and in plain torch."""
