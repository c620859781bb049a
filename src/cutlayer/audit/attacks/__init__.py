"""One file an attack; importing this package registers them all (`cutlayer.audit.registry`)."""
