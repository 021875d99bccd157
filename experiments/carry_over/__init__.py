"""Ways from a trained dense network to a generated one."""
