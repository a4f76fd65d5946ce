"""From aligned models to one good model."""
