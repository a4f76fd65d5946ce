"""How objects are told: in one short line, and in plain tables."""
