"""Thresholds from data."""
