"""A run on a Slurm cluster: submit, approve, survive, watch. Its scripts and profiles are in slurm/."""
