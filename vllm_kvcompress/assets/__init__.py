"""Files that ship with the package: the bundled needle model."""
