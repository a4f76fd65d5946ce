"""What several tests need: networks, trained pairs, folders, refusals."""
