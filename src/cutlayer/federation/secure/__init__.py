"""Secure aggregation: members send masked integers, the server learns their sum alone."""
