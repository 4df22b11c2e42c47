"""`kvcompress top`."""
