"""`orpo-ray submit`: check a job before it is uploaded, say what it costs, submit it, and follow its log."""
