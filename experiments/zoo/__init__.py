"""Every network of a library."""
