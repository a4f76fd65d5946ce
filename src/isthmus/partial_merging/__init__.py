"""Partial merges: one trunk for several models, and every model's own layers above it, also for different outputs.

`zip` makes one; `cut` finds what can be shared in the traced graphs; `module` is what comes out.
"""
