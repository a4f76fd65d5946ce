"""Partial zip: one trunk for several models, and every model's own layers above it, also for different outputs.

`zip` makes one; `cut` finds what can be shared in the traced graphs; `module` is what comes out.
"""

from isthmus.partial_zip.module import Head, PartialZip
from isthmus.partial_zip.zip import partial_zip

__all__ = ["Head", "PartialZip", "partial_zip"]
