"""Translate other people's published measurements into records; one module per family of sources."""
