"""Attacks on recordings, and the scored report."""
