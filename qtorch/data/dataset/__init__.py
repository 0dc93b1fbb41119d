"""Datasets: segments, samples, batches, sample weights and extra tensors."""
