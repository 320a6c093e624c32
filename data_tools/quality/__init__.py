"""Quality control of shards with measures, rules, validation and statistics."""
