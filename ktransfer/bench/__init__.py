"""`ktransfer bench`: the speed of the parts, and what the machine can do at most."""
