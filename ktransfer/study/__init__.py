"""Studies of the whole chain: a grid of settings and arms, in which what cells share is made once."""
