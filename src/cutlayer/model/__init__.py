"""Room 1: models, cut into parts. No network, no noise, no federation."""
