"""Proof of what the other side runs, and masked work on hardware that nobody trusts.

Terms of RFC 9334: an attester makes evidence, a verifier turns it into claims, a policy decides.
It opens no channel to a trunk, trains nothing and knows no frame's meaning.
"""
