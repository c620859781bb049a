"""Bytes: frames, codecs, channels. It knows shapes and dtypes, never meanings."""
