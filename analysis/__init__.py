"""What the features of a dictionary mean: cells, genes, gene sets, tables and figures."""
