"""What others named, packed or published in ways of their own: one module for each."""
