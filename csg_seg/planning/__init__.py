"""Choose settings that meet a size budget."""
