"""The one training loop of the project, and what every training can be told."""
