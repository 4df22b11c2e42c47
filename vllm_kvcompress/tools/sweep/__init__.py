"""`kvcompress sweep`."""
