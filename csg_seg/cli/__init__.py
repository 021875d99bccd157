"""The command ``csg-seg`` and what command-line tools share."""
