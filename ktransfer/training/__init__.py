"""The one training loop of the project, and the settings of every training."""
