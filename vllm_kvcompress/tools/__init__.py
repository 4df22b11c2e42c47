"""The `kvcompress` command."""
