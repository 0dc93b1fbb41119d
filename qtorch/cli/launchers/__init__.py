"""Hydra launchers and sweepers: submitit (SLURM), Ray, Optuna."""
