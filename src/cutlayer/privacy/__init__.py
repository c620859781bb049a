"""What may leave the data owner: noise, its accounting, and the one gate."""
