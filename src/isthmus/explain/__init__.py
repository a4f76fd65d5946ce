"""What a merged network's units are: the evidence beside every alignment."""
