"""Which cut fits this task, this hardware and this link: measure, predict, recommend."""
