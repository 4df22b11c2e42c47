"""The models in plain torch and transformers: for training, and to compare with."""
