"""The fleet: many trainings of one architecture (seeds, rates, windows) as one batched program."""
