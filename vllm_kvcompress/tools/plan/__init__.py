"""`kvcompress plan`."""
