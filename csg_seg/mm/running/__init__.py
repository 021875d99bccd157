"""From a command line to a Runner: configs, checks before a run, processes, comparisons."""
