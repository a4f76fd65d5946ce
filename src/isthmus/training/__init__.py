"""The trainer that makes comparable parents."""
