"""Commands: arguments in, text and exit codes out. It computes nothing itself."""
