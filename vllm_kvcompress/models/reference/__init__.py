"""The models in plain transformers and torch: oracles, and what can be trained."""
