"""The engine seam: the only package that imports nanotron."""
