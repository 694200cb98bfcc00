"""Processes of a local Ray that start as copies of one process, which has imported Ray, torch and the rest once.

Ray starts a new Python for each actor, and each one imports Ray (twice), torch and transformers: about 7 seconds of CPU
a process, of which a run on one machine has six and more. Here, Ray starts `launcher.py` in their place, which asks
`server.py` for a fork.
"""
