"""Everything that knows vLLM's insides."""
