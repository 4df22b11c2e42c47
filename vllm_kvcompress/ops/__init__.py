"""One file per operation: its plain torch meaning, which is also its oracle."""
