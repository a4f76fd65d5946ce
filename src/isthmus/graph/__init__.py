"""A captured program, and running it on numbers."""
