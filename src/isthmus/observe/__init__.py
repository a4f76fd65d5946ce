"""What networks do on data."""
