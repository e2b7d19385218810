"""What protocols learn: linear, logistic, hinge and nearest-neighbour classifiers, and fine-tuning."""
