"""`orpo-ray doctor`: look for what would make a run fail on a cluster, before the run."""
