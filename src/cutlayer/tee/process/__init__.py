"""What an enclave's process gives up on plain Linux, for development and as defence in depth.

None of it hides memory from the machine's root: what it makes is labelled SIMULATED. It attests
nothing, computes nothing and starts no process.
"""
