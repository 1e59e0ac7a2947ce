"""From files and hub data sets to micro-batches: sources, rows, tokens with a loss mask, packing; and what can be said of them."""
