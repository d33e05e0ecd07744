"""Backends: each runs one model and keeps one cache per row."""
