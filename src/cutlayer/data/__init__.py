"""The owner's text as rows of tokens and labels, assets to try with, and tasks to score."""
