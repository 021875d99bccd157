"""Turn dense convs into generated ones, load weights into them, and turn them back."""
