"""Data sets of the reference package: photos, procedural street scenes, and your own folder."""
