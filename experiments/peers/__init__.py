"""Time and size of networks of equal parameters: CSG beside what a user would do instead."""
