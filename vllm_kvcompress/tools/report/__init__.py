"""`kvcompress report`: results of `eval` and `bench` as one page with pictures."""
