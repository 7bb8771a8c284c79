"""Templates of jobs, filled in by `megavit.cluster`."""
