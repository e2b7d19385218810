"""One pass over the rows, `scan(rows, centroids)`: on the CPU, by bounds, on a GPU."""
