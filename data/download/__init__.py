"""Pairs from the web: img2dataset fetches, and this package decides what, how politely, and what came of it."""
