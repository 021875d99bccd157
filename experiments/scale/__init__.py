"""Cost of retrofitting, fitting, saving and loading by network size."""
