"""Weights and adapters that their owner shows to nobody: sealed, released to attested places.

It opens no connection and judges no evidence itself (`tee.verify`); what a place does with the
plain weights is the business of the software that its measurement names.
"""
