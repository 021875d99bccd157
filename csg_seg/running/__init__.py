"""Prepare and run training and testing: config files, checks before a run, the work folder, processes."""
