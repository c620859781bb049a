"""Method 1: frozen linear layers on an accelerator that nobody trusts, under one-time pads."""
