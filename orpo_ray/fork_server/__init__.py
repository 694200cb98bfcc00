"""Processes of a local Ray that start as copies of one process, which has imported Ray, torch and the rest once.

Ray starts a new Python for each actor. Each one imports Ray twice, and most import torch and transformers: seconds of
CPU for every process of a run. Here, Ray starts `launcher.py` instead, which asks `server.py` for a fork.
"""
