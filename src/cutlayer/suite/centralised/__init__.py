"""The unsplit counterpart: fine-tune and score with transformers and PEFT alone.

A script by itself: where this folder lies, `python -m centralised REQUEST.json RESPONSE.json`. It
imports nothing of cutlayer, so what it finds owes nothing to the split model. It knows no task and
no official score.
"""
