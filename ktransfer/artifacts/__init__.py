"""The files between the stages: features, centroids, pseudo-labels."""
