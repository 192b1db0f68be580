"""What is refused before an image is decoded.

This module imports nothing, so help texts can quote it.
"""

MAX_PIXELS = 64 * 10**6
"""Pixels of an image. One with more is refused before it is decoded."""
PILLOW_MAX_PIXELS = 178_956_970
"""Pillow itself opens no image with more pixels than this."""
MAX_FILE = 1 << 28
"""Bytes of an image file: four for each of MAX_PIXELS."""
