"""Room 5: the data owner. Trains, generates, exports; nothing leaves but through privacy."""
