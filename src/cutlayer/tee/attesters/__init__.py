"""One module per source of evidence; importing this package registers them all."""
