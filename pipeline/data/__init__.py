"""Data sets: images, labels, class names, splits, SHA-256; where they come from, and how large ones are read."""
