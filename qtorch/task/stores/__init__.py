"""Where a task pool lies: SQLite, PostgreSQL or MongoDB, chosen by the URL's scheme."""
