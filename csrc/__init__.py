"""Sources of native providers of `vllm_kvcompress.ops`, compiled where they run."""
