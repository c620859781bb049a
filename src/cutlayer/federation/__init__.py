"""Rounds of many owners: state dicts in, state dicts out; no sockets, no clock, no text."""
