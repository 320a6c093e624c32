"""Quality control: measures and rules, validation and statistics of shards."""
