"""One module per platform; importing this package registers them all."""
