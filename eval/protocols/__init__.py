"""The protocols, one module each (see `protocol`)."""
