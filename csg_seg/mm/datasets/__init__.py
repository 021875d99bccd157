"""Data sets that the mm libraries lack, and checks of labels."""
