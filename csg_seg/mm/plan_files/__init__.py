"""Plan a config: build its dense network, write the config of a plan, draw the trade-off curve."""
