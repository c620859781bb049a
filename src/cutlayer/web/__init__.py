"""What every HTTP server of the product shares: token, gate, socket."""
