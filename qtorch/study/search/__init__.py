"""Hyperparameter search with Optuna: studies in a database that several processes share."""
