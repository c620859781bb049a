"""The owner's OpenAI-compatible endpoint and its chat page."""
