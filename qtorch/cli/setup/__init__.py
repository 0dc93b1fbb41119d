"""Commands for a new user: a first project, and completion in the shell."""
