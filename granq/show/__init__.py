"""Pictures: a data frame goes in, a figure comes out."""
