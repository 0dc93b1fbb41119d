"""The trials of a search, through Optuna: a study in a database, and what its processes do."""
