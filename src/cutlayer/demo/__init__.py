"""The main job on real input: two processes, one small model, one task. It is no library."""
