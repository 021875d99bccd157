"""Generated convs inside a network: the conv, the bank of generators, loading and watching."""
