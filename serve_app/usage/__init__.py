"""Who calls, how often, how well, at what cost: events, their files, their reports."""
