"""Drop-in replacements for discriminators of other projects, by their documented signatures.

``from dpsims.compat import vision_aided_loss`` and
``from dpsims.compat.projected_gan import ProjectedDiscriminator`` replace the import lines of a
script; the rest of it stays.
"""
