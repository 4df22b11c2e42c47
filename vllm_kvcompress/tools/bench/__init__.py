"""`kvcompress bench`."""
