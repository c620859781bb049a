"""Scores of task files through the split model."""
