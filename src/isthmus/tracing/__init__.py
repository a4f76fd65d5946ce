"""From a module to its symmetry: labels are executed on the graph, and what they say is proved."""
