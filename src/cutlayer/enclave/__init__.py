"""The attested worker: blocks, tail and adapters of several owners in one confidential place.

It lives above `client` and `server`; a server process never imports it.
"""
