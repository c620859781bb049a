"""The server's HTTP port: page, metrics, health; it changes nothing."""
