"""`python -m orpo_ray` is `orpo-ray`."""

from orpo_ray.cli import main

main()
