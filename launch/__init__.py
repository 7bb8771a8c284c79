"""What clusters get: templates, filled in by `megavit.cluster`."""
