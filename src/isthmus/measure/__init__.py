"""Measurements between models: lines, planes, cycles, and all methods beside one another."""
