"""Federations on one machine, from one file; it composes clients and servers."""
