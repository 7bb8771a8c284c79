"""Hold the templates of jobs, which `megavit.cluster` fills in."""
