"""Room 6: the trunk server. Never sees a token, a label, a text or a loss."""
