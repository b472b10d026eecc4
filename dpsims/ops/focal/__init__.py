"""The focal loss of every pixel and its gradient, in one pass over the logits.

:func:`dpsims.losses.pixel_focal_loss` is the public way in.
"""

from dpsims.ops.focal.api import resolve_focal_impl as resolve_focal_impl
