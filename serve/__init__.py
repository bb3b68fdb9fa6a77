"""Serve models over HTTP, show them on a page, and export them for machines without torch."""
