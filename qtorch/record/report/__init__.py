"""The report page of a run: its results, charts and HTML templates."""
