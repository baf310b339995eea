"""Measurements: a model and batches of images in, a tidy data frame out."""
