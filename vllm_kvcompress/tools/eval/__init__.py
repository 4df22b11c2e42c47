"""`kvcompress eval`."""
