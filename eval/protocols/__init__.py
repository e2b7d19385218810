"""The protocols, one module each (see `base`)."""
